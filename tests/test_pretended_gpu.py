"""The ways through the model on GPUs that are not there (pretended_gpu.py): tensors of two devices are never mixed, a
graph holds nothing but work of the GPU, the host waits once for each token, and the results are those of the CPU."""

import json
import os
import queue
import shutil
import sys
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from pretended_gpu import pretended_gpus

import visualrwkv
from bench import gpu, gpu_parts
from visualrwkv import RWKVState, cuda_graphs
from visualrwkv import rwkv as modules
from visualrwkv.decoding import Decoder, Reply
from visualrwkv.ops import kernel, use_kernel, wkv6
from visualrwkv.prompt import Turn
from visualrwkv.sampling import Sampling
from visualrwkv.serving.engine import Engine, ServedReply
from visualrwkv.training import compile_layers

COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
needs_kernel = pytest.mark.skipif(not COMPILER or sys.platform == "win32", reason="needs a C++ compiler")
QUESTIONS = ["What is the colour?", "What?", "What is it, 在哪里?"]
SEEDED = {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.1}
pytestmark = pytest.mark.filterwarnings("error:.* without a CUDA graph")
SHORT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def gpus(vlm):
    """Around the tests of this file; the model of the CPU is loaded before."""
    with pretended_gpus() as found:
        yield found


@pytest.fixture(scope="module")
def on_gpu(gpus, random_folder):
    return visualrwkv.load(random_folder, device="cuda:0")


def inputs_of(vlm, pictures, answers=None):
    """Two prompts, padded to the same length, on the model's device."""
    turns = [[Turn("user", question, images=1)] for question in QUESTIONS[:2]]
    for turn, answer in zip(turns, answers or [], strict=False):
        turn.append(Turn("assistant", answer))
    inputs = vlm.processor.prepare(images=[[picture] for picture in pictures[:2]], turns=turns, open_reply=not answers)
    return {name: value.to(vlm.model.device) for name, value in inputs.items()}


def test_everything_is_there(on_gpu):
    assert {tensor.device for tensor in on_gpu.model.state_dict().values()} == {torch.device("cuda:0")}


@pytest.mark.parametrize("sampling", [{}, SEEDED, {"frequency_penalty": 1.0}, {"stop": ["e"]}], ids=str)
def test_answers(vlm, on_gpu, pictures, sampling):
    options = SHORT | sampling
    assert on_gpu.ask(pictures[:3], QUESTIONS, **options) == vlm.ask(pictures[:3], QUESTIONS, **options)
    assert on_gpu.ask(pictures[0], "What?", **options) == vlm.ask(pictures[0], "What?", **options)
    assert list(on_gpu.stream(None, "What?", **options)) == list(vlm.stream(None, "What?", **options))


def test_without_kernels_and_graphs(vlm, on_gpu, pictures):
    with use_kernel(False):
        assert on_gpu.ask(pictures[:3], QUESTIONS, **SHORT) == vlm.ask(pictures[:3], QUESTIONS, **SHORT)


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"dtype": "bfloat16"}, {"dtype": "float64"}], ids=str)
def test_other_precisions(gpus, random_folder, pictures, options):
    """Without the kernels, which keep more digits than the modules of a 16-bit model."""
    there, here = (visualrwkv.load(random_folder, device=device, **options) for device in ("cuda:0", "cpu"))
    with use_kernel(False):
        wanted = here.ask(pictures[:3], QUESTIONS, **SHORT)
        assert there.ask(pictures[:3], QUESTIONS, **SHORT) == wanted
    assert all(there.ask(pictures[:3], QUESTIONS, **SHORT)), "by kernels and graphs"


def test_float16_keeps_its_type(gpus, random_folder, pictures):
    there = visualrwkv.load(random_folder, device="cuda:0", dtype="float16")
    assert there.model.dtype == torch.float16
    assert all(there.ask(pictures[:3], QUESTIONS, **SHORT))


@pytest.mark.parametrize("sampling", [{}, SEEDED, {"presence_penalty": 1.0}], ids=["plain", "sampled", "penalised"])
def test_the_host_waits_once_for_a_token(gpus, on_gpu, pictures, sampling):
    replies = [Reply(on_gpu.processor.tokenizer, Sampling.of(sampling)) for _ in range(2)]
    decoder = Decoder(on_gpu.model)
    decoder.read(replies, inputs_of(on_gpu, pictures))
    decoder.advance()  # records the graph
    gpus.waits.clear()
    for _ in range(3):
        assert len(decoder.advance()) == 2
    assert gpus.waits == {"aten._to_copy": 3, "upload": 3}  # the chosen tokens come, and go back


def test_replies_join_and_leave(gpus, vlm, on_gpu, pictures, monkeypatch):
    """The server's loop, in a thread of its own and in inference mode."""
    original = Engine._work

    def work(self):
        with gpus:
            original(self)

    def answers(which):
        heard, engine = queue.Queue(), Engine(which, slots=2)
        for number, question in enumerate(QUESTIONS):
            ids, _ = which.processor.encode_turns([Turn("user", question)], open_reply=True)
            sampling = Sampling(max_new_tokens=3 + 4 * number)
            tell = partial(lambda number, *told: heard.put((number, *told)), number)
            engine.submit(ServedReply(which.processor.tokenizer, sampling, ids, [], tell))
        texts, finished = [""] * len(QUESTIONS), 0
        while finished < len(QUESTIONS):
            number, text, finish = heard.get(timeout=60)
            assert not isinstance(finish, Exception), finish
            texts[number] += text
            finished += finish is not None
        engine.close()
        return texts

    wanted = answers(vlm)
    monkeypatch.setattr(Engine, "_work", work)
    assert answers(on_gpu) == wanted


def test_conversations_move_between_devices(vlm, on_gpu, pictures, tmp_path):
    files = [tmp_path / "gpu.safetensors", tmp_path / "cpu.safetensors"]
    talks = [which.chat() for which in (on_gpu, vlm)]
    for talk, file in zip(talks, files, strict=True):
        talk.say("What?", images=pictures[:1], **SHORT)
        talk.fork().say("Why?", **SHORT)
        talk.save(file)
    talks += [vlm.chat.load(files[0]), on_gpu.chat.load(files[1])]
    for turn in ({"text": "And?", "look_again": True}, {"text": "What is it?", "stop": ["e", "a"]}, {"text": "So?"}):
        assert len({talk.say(**turn, **SHORT) for talk in talks}) == 1
    assert talks[0].nbytes == talks[1].nbytes


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_of_transformers(vlm, on_gpu, pictures, beams):
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    here, there = (which.model.generate(**inputs_of(which, pictures), **options).tolist() for which in (vlm, on_gpu))
    assert here == there


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_training(gpus, random_folder, pictures, precision):
    def losses(device):
        vlm = visualrwkv.load(random_folder, device=device)
        model, found = vlm.model.train(), []
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        inputs = inputs_of(vlm, pictures, ["red", "the colour is blue"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        for _ in range(2):
            with torch.autocast(torch.device(device).type, precision, enabled=precision != torch.float32):
                loss = model(**inputs, labels=inputs["input_ids"]).loss
            optimizer.zero_grad()
            with gpus.backward(device) if device != "cpu" else nullcontext():
                loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    here, there = losses("cpu"), losses("cuda:0")
    assert there[0] != there[1]
    assert there == pytest.approx(here, rel=1e-4 if precision == torch.float32 else 2e-2)


def test_a_model_on_another_gpu_has_graphs_of_its_own(gpus, vlm, on_gpu, random_folder, pictures):
    wanted = vlm.ask(pictures[:3], QUESTIONS, **SHORT)
    other = visualrwkv.load(random_folder, device="cuda:1")
    for which in (on_gpu, other, on_gpu):
        assert which.ask(pictures[:3], QUESTIONS, **SHORT) == wanted
        assert cuda_graphs._steps[which.model.rwkv]


@needs_kernel
def test_while_a_graph_is_recorded_other_threads_keep_their_states(gpus):
    """The states of all layers begin as the same tensor of zeros."""
    r, k, v, w, u, state = (
        torch.randn(*size, device="cuda:0") for size in [(1, 4, 2, 64)] * 4 + [(2, 64), (1, 2, 64, 64)]
    )
    before, finals = state.clone(), []

    def other():
        with gpus:
            finals.append(wkv6(r, k, v, w, u, state)[1])

    with torch.no_grad(), kernel.states_in_place():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert finals[0] is not state
        torch.testing.assert_close(state.cpu(), before.cpu(), rtol=0, atol=0)
        assert wkv6(r, k, v, w, u, state)[1] is state
        torch.testing.assert_close(state.cpu(), finals[0].cpu())


@pytest.mark.parametrize("reading", ["clone", "concatenate", "tensors", "forward"])
def test_a_state_is_read_as_a_whole_while_others_decode(gpus, on_gpu, monkeypatch, reading):
    """It lies in the memory of a graph, which another thread's state takes over within the first layer."""
    rwkv = on_gpu.model.rwkv
    embeds = rwkv.emb.weight[None, :3].detach()
    states = [RWKVState.zeros(rwkv.config, 1, device="cuda:0") for _ in range(2)]
    threads = []

    def other():
        with gpus, torch.no_grad():
            rwkv(embeds[:, 1:2], states[1])

    def meanwhile(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if not threads:
                threads.append(threading.Thread(target=other))
                threads[0].start()
                threads[0].join(timeout=0.5)  # where the state is protected, the other one waits for us
            return result

        return call

    with torch.no_grad():
        rwkv(embeds[:, :1], states[0])
        kept = RWKVState([type(layer)(*(x.clone() for x in layer)) for layer in states[0].layers], states[0].seen)
        if reading == "forward":
            monkeypatch.setattr(modules, "token_shift", meanwhile(modules.token_shift))
            found = rwkv(embeds, states[0])[1]
            monkeypatch.undo()
            wanted = rwkv(embeds, kept)[1]
        else:
            wanted = kept
            original = {"clone": "clone", "concatenate": "cat", "tensors": "cpu"}[reading]
            holder = torch if reading != "tensors" else type(embeds)
            monkeypatch.setattr(holder, original, meanwhile(getattr(holder, original)))
            found = RWKVState.concatenate(states[:1]) if reading == "concatenate" else getattr(states[0], reading)()
            monkeypatch.undo()
        threads[0].join()
        found, wanted = (x if isinstance(x, dict) else x.tensors() for x in (found, wanted))
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, msg=name)


def test_where_recording_fails_decoding_goes_on(gpus, random_folder, pictures, monkeypatch):
    there = visualrwkv.load(random_folder, device="cuda:0")
    wanted = there.ask(pictures[0], "What?", **SHORT)
    stream, step = torch.cuda.current_stream(), cuda_graphs.StaticStep._step
    monkeypatch.setattr(cuda_graphs, "_RECORDS_AGAIN", True)

    def out_of_memory(self):
        raise torch.OutOfMemoryError("of memory for so many")

    for broken in (out_of_memory, lambda self: step(self) if not gpus.recording else out_of_memory(self)):
        with monkeypatch.context() as patch:
            patch.setattr(cuda_graphs.StaticStep, "_step", broken)
            with pytest.warns(RuntimeWarning, match="up to 2 sequences .* without a CUDA graph"):
                assert there.ask(pictures[0], ["What?"] * 2, **SHORT) == [wanted] * 2
        assert torch.cuda.current_stream() is stream
        assert there.ask(pictures[0], ["What?"] * 2, **SHORT) == [wanted] * 2, "not tried again"
        graphs = {key[0]: graph is not None for key, graph in cuda_graphs._steps[there.model.rwkv].items()}
        assert graphs == {1: True, 2: False}
        cuda_graphs._steps[there.model.rwkv].popitem()


def test_a_pytorch_that_a_failed_recording_spoils_records_no_more(gpus, random_folder, pictures, monkeypatch):
    there, tried = visualrwkv.load(random_folder, device="cuda:0"), []
    wanted = there.ask(pictures[0], "What?", **SHORT)
    step = cuda_graphs.StaticStep._step

    def broken(self):
        tried.append(gpus.recording is not None)
        if gpus.recording:
            raise RuntimeError("not permitted")
        step(self)

    monkeypatch.setattr(cuda_graphs, "_RECORDS_AGAIN", False)
    monkeypatch.setattr(cuda_graphs, "_refused", "")
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="up to 2 sequences"):
        patch.setattr(cuda_graphs.StaticStep, "_step", broken)
        there.ask(pictures[0], ["What?"] * 2, **SHORT)
        assert tried == [False, False, True]
        with pytest.warns(RuntimeWarning, match="up to 4 sequences .* records nothing more"):
            assert there.ask(pictures[0], ["What?"] * 3, **SHORT) == [wanted] * 3
        assert len(tried) == 3
    assert there.ask(pictures[0], "What?", **SHORT) == wanted, "from the graph of before"


def test_what_is_hooked_in_is_called_for_each_token(gpus, random_folder):
    rwkv = visualrwkv.load(random_folder, device="cuda:0").model.rwkv
    state, embeds, seen = RWKVState.zeros(rwkv.config, 1, device="cuda:0"), rwkv.emb.weight[None, :1].detach(), []
    with torch.no_grad():
        before = rwkv(embeds, state.clone())[0]
        hook = rwkv.blocks[1].ffn.key.register_forward_hook(lambda module, args, out: seen.append(1))
        for _ in range(2):
            assert torch.allclose(rwkv(embeds, state.clone())[0], before)
        assert len(seen) == 2
        hook.remove()
        rwkv(embeds, state.clone())
        assert len(seen) == 2


def test_adapters_on_some_layers_can_be_switched_off(gpus, vlm, random_folder):
    peft = pytest.importorskip("peft")
    there = visualrwkv.load(random_folder, device="cpu")
    config = peft.LoraConfig(target_modules=["receptance"], layers_to_transform=[1], init_lora_weights=False)
    adapted = peft.get_peft_model(there.model, config).to("cuda:0")
    changed = there.ask(None, QUESTIONS, **SHORT)
    with adapted.disable_adapter():
        assert there.ask(None, QUESTIONS, **SHORT) == vlm.ask(None, QUESTIONS, **SHORT) != changed


def test_a_weight_that_takes_the_place_of_another_is_used(gpus, random_folder):
    rwkv = visualrwkv.load(random_folder, device="cuda:0").model.rwkv
    state, embeds = RWKVState.zeros(rwkv.config, 1, device="cuda:0"), rwkv.emb.weight[None, :1].detach()
    with torch.no_grad():
        rwkv(embeds, state.clone())
        rwkv.blocks[1].ffn.value.weight = torch.nn.Parameter(2 * rwkv.blocks[1].ffn.value.weight)
        changed = rwkv(embeds, state.clone())[0]
        with use_kernel(False):
            torch.testing.assert_close(changed.cpu(), rwkv(embeds, state.clone())[0].cpu())


def test_a_weight_that_moves_alone_is_found(gpus, random_folder):
    """As after model.cpu(); model.cuda(): the same parameters, most of which may lie where they were."""
    rwkv = visualrwkv.load(random_folder, device="cuda:0").model.rwkv
    state, embeds = RWKVState.zeros(rwkv.config, 1, device="cuda:0"), rwkv.emb.weight[None, :1].detach()
    with torch.no_grad():
        rwkv(embeds, state.clone())
        for tensor in (rwkv.blocks[1].ffn.value.weight, rwkv.blocks[0].att.time_faaaa, rwkv.ln_out.bias):
            tensor.inner = 2 * tensor.inner + 1
            moved = rwkv(embeds, state.clone())[0]
            assert len(cuda_graphs._steps[rwkv]) == 1, "the graph over the old weights is gone"
            with use_kernel(False):
                torch.testing.assert_close(moved.cpu(), rwkv(embeds, state.clone())[0].cpu())


@needs_kernel
def test_layers_that_are_compiled_find_the_kernels_of_the_gpu(gpus, random_folder, monkeypatch):
    """Nothing loads them while a layer is traced."""
    monkeypatch.setattr(kernel, "_on_cuda", False)
    compile_layers(visualrwkv.load(random_folder, device="cpu").model)
    assert kernel._on_cuda


@needs_kernel
@pytest.mark.parametrize("part", ["check", "wkv", "decode", "prefill", "train"])
def test_the_parts_of_the_benchmark_run(gpus, monkeypatch, capsys, part):
    """With small sizes; so that a run on a GPU is not lost to a slip of the pen."""
    small = {"vocab_size": 100, "hidden_size": 128, "num_hidden_layers": 2}
    original = cuda_graphs.record

    def record(function):
        try:
            return original(function)
        except RuntimeError as error:
            raise AssertionError("recorded what cannot be") from error

    monkeypatch.setattr(cuda_graphs, "record", record)
    for name, value in {
        "MODELS": {"1.6B": small, "7B": small | {"time_mix_rank": 64, "decay_rank": 128}},
        "CHECKED": (((2, 20, 2), 64), ((1, 9, 2), 32)),
        "DECAYS": ((0.0, 1.5),),
        "ROWS": ((1, 20, 2),),
        "PROMPT": 20,
        "WRITTEN": 4,
        "SEQUENCE": 20,
        "COPIED": 1000,
        "SQUARE": 64,
        "milliseconds": partial(gpu_parts.milliseconds, seconds=0.0),
    }.items():
        monkeypatch.setattr(gpu_parts, name, value)
    gpu_parts.PARTS[part]()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(gpu_parts.MARK)]
    results = [json.loads(line.removeprefix(gpu_parts.MARK)) for line in lines]
    assert [result for result in results if "failed" in result] == []
    assert len(results) == {"check": 7, "wkv": 5, "decode": 4, "prefill": 3, "train": 3}[part]
    timed = {result["case"]: result["timed"] for result in results if "timed" in result}
    assert all(how == ("calls" if "PyTorch" in case else "graph") for case, how in timed.items())
    assert all(gpu.line(result) for result in results)
