"""Llama weights from and to Hugging Face folders: their names, their order of rows, their config.json."""
