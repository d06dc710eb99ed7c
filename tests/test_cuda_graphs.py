"""Decoding from memory that stays in its place (visualrwkv.cuda_graphs): its logic, and on a GPU the graphs."""

import pytest
import torch

from visualrwkv import cuda_graphs
from visualrwkv.cuda_graphs import StaticStep
from visualrwkv.ops import use_kernel
from visualrwkv.state import RWKVState

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def rwkv(vlm):
    return vlm.model.rwkv


def prefix(rwkv, batch=1, seed=0):
    """A state that has read some tokens."""
    generator = torch.Generator().manual_seed(seed)
    device = rwkv.emb.weight.device
    tokens = torch.randint(0, 200, (batch, 5), generator=generator).to(device)
    with torch.no_grad():
        return rwkv(rwkv.emb(tokens))[1]


def next_embeds(rwkv, batch=1, count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 200, (count, batch, 1), generator=generator).to(rwkv.emb.weight.device)
    return rwkv.emb(tokens).detach()


@torch.no_grad()
def plain(rwkv, state, embeds):
    with use_kernel(False):
        return [rwkv(x, state)[0] for x in embeds]


def close(a, b):
    torch.testing.assert_close(a, b, **TOLERANCE)


def equal_states(a, b):
    for mine, its in zip(a.layers, b.layers, strict=True):
        for x, y in zip(mine, its, strict=True):
            close(x, y)


def static_step(rwkv, batch=1, places=None, recorder=lambda function: function):
    state = prefix(rwkv, batch)
    return StaticStep(rwkv, next_embeds(rwkv, batch)[0], state, recorder, places or batch)


@pytest.mark.parametrize(("batch", "places"), [(1, 1), (3, 3), (3, 4)])
def test_equals_the_modules(rwkv, batch, places):
    static, state, wanted_state = static_step(rwkv, batch, places), prefix(rwkv, batch), prefix(rwkv, batch)
    embeds = next_embeds(rwkv, batch)
    wanted = plain(rwkv, wanted_state, embeds)
    results = [static(x, state) for x in embeds]
    for a, b in zip(results, wanted, strict=True):
        close(a, b)
    equal_states(state, wanted_state)
    places = [(tensor.data_ptr(), id(tensor)) for layer in state.layers for tensor in layer]
    static(embeds[0], state)
    assert places == [(tensor.data_ptr(), id(tensor)) for layer in state.layers for tensor in layer], "copied"
    assert state.layers[0].wkv.data_ptr() == static.layers[0].wkv.data_ptr()


def test_states_take_turns(rwkv):
    static, embeds = static_step(rwkv), next_embeds(rwkv, count=6)
    states = [prefix(rwkv, seed=seed) for seed in (5, 6)]
    alone = [prefix(rwkv, seed=seed) for seed in (5, 6)]
    wanted = [plain(rwkv, alone[i % 2], [x])[0] for i, x in enumerate(embeds)]
    for i, x in enumerate(embeds):
        close(static(x, states[i % 2]), wanted[i])
    for state, its in zip(states, alone, strict=True):
        equal_states(state, its)


def test_sequences_come_and_go_in_one_memory(rwkv):
    static, embeds = static_step(rwkv, 1, 4), next_embeds(rwkv, 3, 4)
    state, wanted = prefix(rwkv, 3), prefix(rwkv, 3)
    for x, rows in zip(embeds, ([0, 1, 2], [0, 2], [1], [0]), strict=True):
        state, wanted, x = state.select(rows), wanted.select(rows), x[: len(rows)]
        close(static(x, state), plain(rwkv, wanted, [x])[0])
    joined = [RWKVState.concatenate([one, prefix(rwkv, 3)]) for one in (state, wanted)]
    x = torch.cat([embeds[0], embeds[1][:1]])
    close(static(x, joined[0]), plain(rwkv, joined[1], [x])[0])
    equal_states(*joined)
    equal_states(state, wanted)


def test_an_earlier_state_is_kept_by_cloning(rwkv):
    static, embeds = static_step(rwkv), next_embeds(rwkv)
    state = prefix(rwkv)
    static(embeds[0], state)
    earlier = state.clone()
    first = static(embeds[1], state)
    static(embeds[2], state)
    close(static(embeds[1], earlier), first)


def test_a_second_holder_of_the_same_tensors(rwkv):
    static, embeds = static_step(rwkv), next_embeds(rwkv)
    state = prefix(rwkv)
    static(embeds[0], state)
    other, kept = RWKVState(state.layers, state.seen), state.clone()
    static(embeds[1], other)
    equal_states(state, kept)


def test_a_changed_state_is_read_again(rwkv):
    static, embeds = static_step(rwkv, 2), next_embeds(rwkv, 2)
    state, wanted = prefix(rwkv, 2), prefix(rwkv, 2)
    static(embeds[0], state)
    plain(rwkv, wanted, embeds[:1])
    for each in (state, wanted):
        each.reorder_cache(torch.tensor([1, 0]))
    close(static(embeds[1], state), plain(rwkv, wanted, embeds[1:2])[0])


def test_a_forgotten_state_is_not_copied(rwkv):
    static, embeds = static_step(rwkv), next_embeds(rwkv)
    state = prefix(rwkv)
    static(embeds[0], state)
    del state
    assert static._owner() is None


def test_made_in_inference_mode_used_outside(rwkv):
    embeds = next_embeds(rwkv)
    with torch.inference_mode():
        static, state = static_step(rwkv), prefix(rwkv)
        static(embeds[0], state)
    with torch.no_grad():
        static(embeds[1], state)
    assert not state.layers[0].wkv.is_inference()


def test_a_cpu_has_no_graph(rwkv):
    with torch.no_grad():
        assert cuda_graphs.step(rwkv, next_embeds(rwkv)[0], prefix(rwkv)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 2, 3, 64, 256])  # 3 have a graph for 4
def test_graphs(random_folder, batch):
    import visualrwkv

    rwkv = visualrwkv.load(random_folder, device="cuda", dtype="float32").model.rwkv
    embeds, states = next_embeds(rwkv, batch, 6), [prefix(rwkv, batch, seed) for seed in (5, 6)]
    alone = [state.clone() for state in states]
    wanted = [plain(rwkv, alone[i % 2], [x])[0] for i, x in enumerate(embeds)]
    with torch.no_grad():
        for i, x in enumerate(embeds):
            torch.testing.assert_close(rwkv(x, states[i % 2])[0], wanted[i], rtol=1e-3, atol=1e-3)
    assert len(cuda_graphs._steps[rwkv]) == 1
    rwkv.half()
    with torch.no_grad():
        rwkv(embeds[0].half(), RWKVState.zeros(rwkv.config, batch, device="cuda", dtype=torch.float16))
    assert len(cuda_graphs._steps[rwkv]) == 1, "the graph over the old weights is gone"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_answers_with_and_without_graphs(random_folder, pictures):
    import visualrwkv

    vlm = visualrwkv.load(random_folder, device="cuda", dtype="float32")
    questions = ["What colour is the circle?", "What?"]
    with use_kernel(False):
        wanted = vlm.ask(pictures[:2], questions, max_new_tokens=16)
    assert vlm.ask(pictures[:2], questions, max_new_tokens=16) == wanted
    assert [vlm.ask(*each, max_new_tokens=16) for each in zip(pictures, questions, strict=False)] == wanted
    assert len(cuda_graphs._steps[vlm.model.rwkv]) == 2
