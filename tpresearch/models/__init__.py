"""Plain PyTorch models. Nothing here knows of devices, meshes or sharding: that is what `parallel/` is for.

What the framework asks of a language model: `forward(tokens: [b, s] int64) -> logits [b, s, V]`, and weights
that are drawn by a `reset_parameters` of the module that owns them (as torch's own layers have it). In-place calls such as
`normal_` and `clamp_` are drawn shard by shard, anything else whole on every rank. Optional:
`reset_buffers()` where buffers hold computed values, `attention_flops_per_token(seq_len)` for MFU.

A network that takes numbers instead says how many: `input_width`, and `forward(x: [b, input_width]) -> [b, ...]`.
"""
