"""Tiny language models of many families, with random weights, saved like real ones."""

GPT = dict(n_positions=32, n_embd=16, n_layer=3)
LAYERS = dict(max_position_embeddings=32, hidden_size=16, num_hidden_layers=3)
ROTARY = dict(LAYERS, intermediate_size=24, num_attention_heads=4)
GROUPED = dict(ROTARY, num_key_value_heads=2)
FALCON = dict(LAYERS, num_attention_heads=4)
FAMILIES = {  # three layers, d_model 16, context 32: the name of transformers' classes, and the configuration
    "gpt2": ("GPT2", dict(GPT, n_head=2)),
    "neox": ("GPTNeoX", dict(ROTARY, num_attention_heads=2)),
    "llama": ("Llama", GROUPED),
    "gpt_neo": ("GPTNeo", dict(max_position_embeddings=32, hidden_size=16, num_layers=3, num_heads=4, window_size=8)
                | dict(attention_types=[[["global", "local", "global"], 1]])),
    "gptj": ("GPTJ", dict(GPT, n_head=4, rotary_dim=4)),
    "codegen": ("CodeGen", dict(GPT, n_head=4, rotary_dim=4)),
    "falcon": ("Falcon", FALCON),
    "falcon_sequential": ("Falcon", dict(FALCON, parallel_attn=False, multi_query=False)),
    "falcon_alibi": ("Falcon", dict(FALCON, alibi=True)),
    "falcon_grouped": ("Falcon", dict(FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "mpt": ("Mpt", dict(d_model=16, n_heads=4, n_layers=3, max_seq_len=32, expansion_ratio=2)),
    "bloom": ("Bloom", dict(hidden_size=16, n_layer=3, n_head=4)),
    "neox_sequential": ("GPTNeoX", dict(ROTARY, use_parallel_residual=False)),
    "qwen2": ("Qwen2", GROUPED),
    "mistral": ("Mistral", dict(GROUPED, sliding_window=8)),
    "gemma": ("Gemma", dict(GROUPED, head_dim=4)),
    "gemma2": ("Gemma2", dict(GROUPED, head_dim=4, sliding_window=8)),
    "opt": ("OPT", dict(LAYERS, num_attention_heads=4, ffn_dim=24, word_embed_proj_dim=16)),
    "phi": ("Phi", ROTARY),
    "gpt1": ("OpenAIGPT", dict(GPT, n_head=4)),
}  # fmt: skip


class Directories(dict):
    """Saved models by family, each made when it is first asked for."""

    def __init__(self, tokenizer, new_directory):
        self.tokenizer, self.new_directory = tokenizer, new_directory

    def __missing__(self, family):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        name, settings = FAMILIES[family]
        common = dict(vocab_size=300, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
        config = getattr(transformers, f"{name}Config")(**settings, **common)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():  # also biases and norms, which start at 0 and 1
                if parameter.ndim == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
        self[family] = self.new_directory(family)
        model.save_pretrained(self[family])
        self.tokenizer.save_pretrained(self[family])
        return self[family]
