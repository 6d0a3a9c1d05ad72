"""What tensors are called: in our trees of parameters, by Hugging Face and in GGUF."""

# Every tensor by its three names: ours, Hugging Face's, GGUF's. Those with a layer are stacked in ours.
TENSORS = (
    ("embed_tokens", "model.embed_tokens.weight", "token_embd.weight"),
    ("input_layernorm", "model.layers.{layer}.input_layernorm.weight", "blk.{layer}.attn_norm.weight"),
    ("q_proj", "model.layers.{layer}.self_attn.q_proj.weight", "blk.{layer}.attn_q.weight"),
    ("k_proj", "model.layers.{layer}.self_attn.k_proj.weight", "blk.{layer}.attn_k.weight"),
    ("v_proj", "model.layers.{layer}.self_attn.v_proj.weight", "blk.{layer}.attn_v.weight"),
    ("o_proj", "model.layers.{layer}.self_attn.o_proj.weight", "blk.{layer}.attn_output.weight"),
    (
        "post_attention_layernorm",
        "model.layers.{layer}.post_attention_layernorm.weight",
        "blk.{layer}.ffn_norm.weight",
    ),
    ("gate_proj", "model.layers.{layer}.mlp.gate_proj.weight", "blk.{layer}.ffn_gate.weight"),
    ("up_proj", "model.layers.{layer}.mlp.up_proj.weight", "blk.{layer}.ffn_up.weight"),
    ("down_proj", "model.layers.{layer}.mlp.down_proj.weight", "blk.{layer}.ffn_down.weight"),
    ("norm", "model.norm.weight", "output_norm.weight"),
    ("lm_head", "lm_head.weight", "output.weight"),
)
# The pivot head is ours alone; a Hugging Face folder has it in a file of its own.
PIVOT_NAME = "pivot_head.weight"
