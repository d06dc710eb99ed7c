"""Long context: the language model of 0.2B against transformers' Llama of the same size, both bfloat16, on the CPU.

The Llama's cache is filled with random numbers instead of being read, which takes the same time per token.
"""

import torch

from bench.language import SMALL, decoder
from bench.measure import PAIR, check_against_modules, in_turns, random_language_model

LLAMA = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2432, "num_attention_heads": 12}


def llama(quick: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 4096 if quick else 65536} | LLAMA | ({"num_hidden_layers": 2} if quick else {})
    config = LlamaConfig(**sizes, num_key_value_heads=12, max_position_embeddings=32768, tie_word_embeddings=False)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def filled_cache(model, length: int):
    """A StaticCache that holds `length` positions of random keys and values and has room for some more."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length + 16)
    with torch.no_grad():
        model(torch.tensor([[1]]), past_key_values=cache)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def llama_token(model, cache, length):
    def run():
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
        with torch.no_grad():
            return model(torch.tensor([[1]]), past_key_values=cache, position_ids=torch.tensor([[length]])).logits

    return run


def long_context(quick: bool) -> list[dict]:
    """Milliseconds of a token behind contexts of several lengths, of reading them, and bytes of memory."""
    ours, peer = random_language_model(torch.bfloat16, **(SMALL if quick else PAIR)), llama(quick)
    results, first = [], None
    for length in (64, 256) if quick else (1024, 4096, 24576):
        ids = torch.randint(1, 1000, (1, length))

        def read(ids=ids):
            state = None
            with torch.no_grad():
                for piece in ids.split(1024, 1):
                    _, state = ours(ours.emb(piece), state)
            return state

        state = read()
        token = decoder(ours, state, 1)
        error = check_against_modules("long_context", token, 3e-2)
        cache = filled_cache(peer, length)
        times = in_turns({"ours": token, "StaticCache": llama_token(peer, cache, length)}, 7)
        median = times["ours"]["median"]
        first = first or median
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        result = {
            "context": length,
            "ms per token": median,
            "over the shortest context": median / first,
            "times StaticCache": times["StaticCache"]["median"] / median,
            "state MiB": state.nbytes / 2**20,
            "cache MiB": kept / 2**20,
            "error": error,
        }

        def read_llama(ids=ids):
            with torch.no_grad():
                peer(ids, use_cache=True, logits_to_keep=1)

        del cache
        rounds = 2 if length <= 4096 else 1  # the Llama reads the longest for minutes
        times |= (reading := in_turns({"reading": read, "reading by Llama": read_llama}, rounds, warm_up=0))
        result["reading times Llama"] = reading["reading by Llama"]["median"] / reading["reading"]["median"]
        results.append(result | {"ms": times})
    return results
