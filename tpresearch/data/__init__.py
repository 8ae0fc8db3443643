"""Corpus -> tokenizer -> packed rows -> deterministic batches."""
