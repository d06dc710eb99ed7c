"""The language model of 0.2B with random weights on the CPU: decoding, prefill, state against recomputing, training."""

import os
import tempfile
import types
from pathlib import Path

import torch

from bench import llama
from bench.measure import (
    PAIR,
    bandwidth_probe,
    by_modules,
    check,
    check_against_modules,
    gemm_probe,
    in_turns,
    random_language_model,
    relative_error,
)
from visualrwkv.ops.int8 import quantize_linears
from visualrwkv.ops.linear import is_plain_linear

TOKENS = 4  # per timed call of decoding
SMALL = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4}


def read_bytes(model) -> int:
    """Bytes of weights that one token has to read: all but the embedding table."""
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers())) - model.emb.weight.nbytes


def decoder(model, state, count=TOKENS):
    """A function that decodes `count` tokens from a state, greedily."""

    def run():
        token, now = torch.zeros(state.batch_size, 1, dtype=torch.long), state.clone()
        with torch.no_grad():
            for _ in range(count):
                hidden, now = model(model.emb(token), now)
                logits = model.logits(hidden)
                token = logits[:, -1].float().argmax(-1, keepdim=True)  # as `generate` does
        return logits

    return run


def start(model, batch=1):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(model.emb(torch.randint(1, 1000, (batch, 16))))[1]


def pip_rwkv(model, folder, strategy):
    """The package `rwkv` on the same weights, or None where it is not installed."""
    try:
        os.environ |= {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
        os.environ.pop("RWKV_V7_ON", None)
        from rwkv.model import RWKV
    except ImportError:
        print("peer rwkv is not installed: skipped")
        return None
    path = Path(folder) / "random.pth"
    torch.save(model.state_dict(), path)
    return RWKV(model=str(path.with_suffix("")), strategy=strategy, verbose=False)


def llama_cpp(model, folder, weights, ids):
    """llama.cpp on the same weights, or None where it is not installed; checked on the prompt `ids`."""
    if not llama.installed():
        print("peer llama.cpp is not installed: skipped")
        return None
    path = Path(folder) / "random.gguf"
    llama.write_gguf(model, path, weights)
    peer = llama.LlamaCpp(path, len(ids))
    with torch.no_grad():
        wanted = model.logits(model(model.emb(torch.tensor([ids])))[0][:, -1:])[0, 0]
    check("llama.cpp", relative_error(peer.forward(ids), wanted), 1e-4 if weights == "fp32" else 0.1)
    return peer


def decode(quick: bool) -> list[dict]:
    """Tokens per second of one sequence, and the share of the read bandwidth of the same run."""
    results = []
    for name in ("fp32", "bf16", "int8"):
        model = random_language_model(torch.float32 if name == "fp32" else torch.bfloat16, **(SMALL if quick else PAIR))
        state = start(model)
        peers = {}
        with tempfile.TemporaryDirectory() as folder:
            peer = None if name == "int8" else pip_rwkv(model, folder, f"cpu {name}")
            llama_peer = llama_cpp(model, folder, name, [5, 6, 7])
        if peer is not None:
            with torch.no_grad():
                wanted = model.logits(model(model.emb(torch.tensor([[5]])))[0])[0, 0]
            limit = 1e-4 if name == "fp32" else 5e-2
            check("decode, pip rwkv", relative_error(peer.forward([5], None)[0], wanted), limit)

            def by_peer(peer=peer):
                token, past = 0, None
                for _ in range(TOKENS):
                    logits, past = peer.forward([token], past)
                    token = int(logits.argmax())
                return logits

            peers["pip rwkv"] = by_peer
        if llama_peer is not None:

            def by_llama(peer=llama_peer):
                token = 0
                for _ in range(TOKENS):
                    token = int(peer.forward([token]).argmax())

            peers["llama.cpp"] = by_llama
        if name == "int8":
            quantize_linears(model)
        ours = decoder(model, state)
        error = check_against_modules("decode", decoder(model, state, 1), 1e-5 if name == "fp32" else 2e-2)
        peers = {"ours": ours, "probe": bandwidth_probe()} | peers | {"modules": by_modules(ours)}
        times = in_turns(peers, 5 if quick else 9)
        per_token, weights = times["ours"]["median"] / TOKENS, read_bytes(model)
        read = (256 << 20) / times["probe"]["median"] / 1e6
        result = {
            "weights": name,
            "tokens/s": 1e3 / per_token,
            "weights GB/s": weights / per_token / 1e6,
            "probe GB/s": read,
            "share of the read bandwidth": weights / per_token / 1e6 / read,
            "error": error,
            "ms per call": times,
        }
        for peer in sorted(times.keys() - {"ours", "probe"}):
            result[f"times {peer}"] = times[peer]["median"] / times["ours"]["median"]
        if llama_peer is not None:
            llama_peer.close()
        results.append(result)
    return results


def decode_batched(quick: bool) -> list[dict]:
    """Tokens per second of several sequences in bfloat16, against the modules."""
    model, results = random_language_model(torch.bfloat16, **(SMALL if quick else PAIR)), []
    for batch in (4, 8, 16):
        state = start(model, batch)
        ours = decoder(model, state, 2)
        error = check_against_modules("decode_batched", decoder(model, state, 1), 2e-2)
        times = in_turns({"ours": ours, "modules": by_modules(ours)}, 5)
        median = times["ours"]["median"]
        results.append(
            {
                "B": batch,
                "tokens/s": 2e3 * batch / median,
                "times modules": times["modules"]["median"] / median,
                "error": error,
                "ms per call": times,
            }
        )
    return results


def prefill(quick: bool) -> list[dict]:
    """Tokens per second of a prompt, and the share of what the bare matrix products of it take."""
    results, sizes = [], SMALL if quick else PAIR
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = random_language_model(dtype, **sizes)
        for length in (128,) if quick else (641,):
            ids = torch.randint(1, 1000, (1, length))

            def ours(model=model, ids=ids):
                with torch.no_grad():
                    hidden, _ = model(model.emb(ids))
                    return model.logits(hidden[:, -1:])

            products = []
            for module in model.blocks.modules():
                if is_plain_linear(module):
                    products.append(gemm_probe(length, module.in_features, module.out_features, dtype))

            def floor(products=products):
                for product in products:
                    product()

            peers = {"ours": ours, "products": floor}
            with tempfile.TemporaryDirectory() as folder:
                peer = pip_rwkv(model, folder, f"cpu {name}")
                llama_peer = llama_cpp(model, folder, name, ids[0].tolist())
            if peer is not None:
                peers["pip rwkv"] = lambda peer=peer, ids=ids: peer.forward(ids[0].tolist(), None)
            if llama_peer is not None:
                peers["llama.cpp"] = lambda peer=llama_peer, ids=ids: (peer.reset(), peer.forward(ids[0].tolist()))
            wanted = by_modules(ours)()
            if "pip rwkv" in peers:
                limit = 1e-3 if name == "fp32" else 0.1
                check("prefill, pip rwkv", relative_error(peers["pip rwkv"]()[0], wanted[0, 0]), limit)
            error = check("prefill", relative_error(ours(), wanted), 1e-4 if name == "fp32" else 3e-2)
            times = in_turns(peers, 3)
            median = times["ours"]["median"]
            result = {"weights": name, "T": length, "tokens/s": 1e3 * length / median, "error": error}
            result["share of the matrix products"] = times["products"]["median"] / median
            for other in sorted(times.keys() - {"ours", "products"}):
                result[f"times {other}"] = times[other]["median"] / median
            if llama_peer is not None:
                llama_peer.close()
            results.append(result | {"ms": times})
    return results


def state_or_recompute(quick: bool) -> list[dict]:
    """A token from the state against reading the whole sequence again, which gives the same tokens."""
    model, results = random_language_model(torch.float32, **(SMALL if quick else PAIR)), []
    for length in (128,) if quick else (641, 2048):
        ids = torch.randint(1, 1000, (1, length))

        def again(model=model, ids=ids):
            with torch.no_grad():
                return model.head(model(model.emb(ids))[0])  # all positions, as the public code does

        with torch.no_grad():
            state = model(model.emb(ids))[1]
            longer, tokens = ids, []
            for _ in range(2):
                token = model.logits(model(model.emb(longer))[0][:, -1:])[:, -1].argmax(-1, keepdim=True)
                tokens.append(int(token))
                longer = torch.cat([longer, token], 1)
            now = model(model.emb(ids[:, :-1]))[1]
            token, ours = ids[:, -1:], []
            for _ in range(2):
                hidden, now = model(model.emb(token), now)
                token = model.logits(hidden)[:, -1].argmax(-1, keepdim=True)
                ours.append(int(token))
        if ours != tokens:
            raise SystemExit(f"state_or_recompute: the tokens differ, {ours} and {tokens}; nothing was timed")
        times = in_turns({"state": decoder(model, state, 1), "recompute": again}, 3)
        ratio = times["recompute"]["median"] / times["state"]["median"]
        results.append({"T": length, "times recompute": ratio, "ms": times})
    return results


def train_step(quick: bool) -> list[dict]:
    """Forward and backward of one sequence, with the kernel and with the chunked PyTorch form."""
    results, small = [], types.MappingProxyType({"vocab_size": 694, "hidden_size": 192, "head_size": 32})
    sizes = {"embedded": {**small, "num_hidden_layers": 6, "intermediate_size": 640}}
    if not quick:
        sizes["0.2B"] = PAIR
    for name, size in sizes.items():
        model = random_language_model(**size).train().requires_grad_(True)
        ids = torch.randint(1, 600, (1, 128 if quick else 1024))

        def ours(model=model, ids=ids):
            model.zero_grad()
            logits = model.logits(model(model.emb(ids))[0])
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
            loss.backward()
            return model.blocks[0].att.key.weight.grad.clone()

        error = check_against_modules("train_step", ours, 1e-3)
        times = in_turns({"ours": ours, "chunked": by_modules(ours)}, 3)
        ratio = times["chunked"]["median"] / times["ours"]["median"]
        results.append({"model": name, "T": ids.shape[1], "times chunked": ratio, "error": error, "ms": times})
    return results
