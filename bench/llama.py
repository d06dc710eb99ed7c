"""llama.cpp as a peer: the same random weights as a GGUF file, tokens through its C interface.

    pip install llama-cpp-python gguf          # compiles llama.cpp for this machine, some minutes

Without these packages the cases go without it. Which tensors are kept in which type follows llama.cpp's own converter:
matrices in that of the file, the small ones of the token shift and the decay in float32.
"""

import importlib.util

import numpy
import torch

TYPES = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}
_NAMES = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.time_maa_x": "time_mix_lerp_x",
    "att.time_maa_w1": "time_mix_w1",
    "att.time_maa_w2": "time_mix_w2",
    "att.time_faaaa": "time_mix_first",
    "att.time_decay": "time_mix_decay",
    "att.time_decay_w1": "time_mix_decay_w1",
    "att.time_decay_w2": "time_mix_decay_w2",
    **{f"att.{name}": f"time_mix_{name}" for name in ("receptance", "key", "value", "gate", "output")},
    "att.ln_x": "time_mix_ln",
    "ffn.time_maa_k": "channel_mix_lerp_k",
    "ffn.time_maa_r": "channel_mix_lerp_r",
    **{f"ffn.{name}": f"channel_mix_{name}" for name in ("key", "receptance", "value")},
}
_OUTSIDE = {"emb": "token_embd", "blocks.0.ln0": "token_embd_norm", "ln_out": "output_norm", "head": "output"}


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def write_gguf(model, path, weights: str) -> None:
    """The language model `model` (an `rwkv.RWKV`) as a GGUF file with matrices of type `weights`, a key of TYPES."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "rwkv6")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_rescale_every_n_layers(0)
    writer.add_wkv_head_size(config.head_size)
    writer.add_time_mix_extra_dim(config.time_mix_rank)
    writer.add_time_decay_extra_dim(config.decay_rank)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(0)
    writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + TYPES[weights] if weights != "fp32" else "ALL_F32"])
    writer.add_tokenizer_model("rwkv")  # never asked to read text; each token is called by its number
    writer.add_token_list([f"t{number}".encode() for number in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    kind = gguf.GGMLQuantizationType[TYPES[weights]]
    for name, tensor in _tensors(model):
        value = numpy.ascontiguousarray(tensor.float().numpy())
        matrix = value.ndim == 2 and not any(part in name for part in ("_w1", "_w2", "_first"))
        stored = kind if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model):
    """(name in GGUF, tensor) of all weights, in llama.cpp's shapes."""
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if kind in ("weight", "bias") and module in _OUTSIDE:
            yield f"{_OUTSIDE[module]}.{kind}", tensor
            continue
        _, layer, rest = name.split(".", 2)
        if rest.startswith("att.time_maa_") and rest[-1] in "wkvrg":
            if rest[-1] == "w":  # the five ratios are one tensor
                att = model.blocks[int(layer)].att
                ratios = torch.stack([getattr(att, f"time_maa_{one}").flatten() for one in "wkvrg"])
                yield f"blk.{layer}.time_mix_lerp_fused.weight", ratios[:, None, None]
            continue
        part, kind = (rest, "weight") if rest in _NAMES else rest.rsplit(".", 1)
        if part.endswith(("_w1", "_w2")):
            tensor = tensor.transpose(-1, -2)
        elif part in ("att.time_decay", "att.time_maa_x", "ffn.time_maa_k", "ffn.time_maa_r"):
            tensor = tensor.flatten()
        yield f"blk.{layer}.{_NAMES[part]}.{kind}", tensor


class LlamaCpp:
    """A GGUF file in llama.cpp, one sequence.

    Args:
        path: of the file; longest: tokens in one call of `forward`.
    """

    def __init__(self, path, longest: int = 1):
        import llama_cpp

        self._lib = llama_cpp
        llama_cpp.llama_log_set(_silent(llama_cpp), None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = max(longest, 512)
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        self._size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def reset(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def forward(self, tokens: list[int]) -> torch.Tensor:
        """Scores (V,) behind the tokens; the state goes on."""
        array = (self._lib.llama_token * len(tokens))(*tokens)
        code = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(tokens)))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        scores = self._lib.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(numpy.ctypeslib.as_array(scores, (self._size,)))

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


def _silent(llama_cpp):
    """A callback that keeps llama.cpp's remarks off the terminal; it must outlive every call."""
    global _callback
    _callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    return _callback


_callback = None
