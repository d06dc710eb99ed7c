"""On how many threads the step of decoding runs, which must not show in what it computes."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from golden_data import error
from test_decoding import COMPILER, language_model, needs_kernel, prefix, steps

import visualrwkv
from visualrwkv.ops import build


@needs_kernel
def test_one_thread_decodes_where_a_team_is_slower(tmp_path):
    """The rule of csrc/crowd.h alone, with given times: what it is told by a crowded machine no test can rely on."""
    (tmp_path / "crowd.cpp").write_text(
        '#include "crowd.h"\nvisualrwkv::Crowd crowd;\nextern "C" bool takes_one() { return crowd.takes_one(); }\n'
        'extern "C" void took(long long wall, long long work) { crowd.took(wall, work); }\n'
        'extern "C" long long core_time() { return visualrwkv::core_time(); }\n'
    )
    command = [COMPILER, "-std=c++17", "-fPIC", "-shared", "-I", build.source_folder(), "-o", "crowd.so", "crowd.cpp"]
    subprocess.run(command, check=True, cwd=tmp_path)
    crowd = ctypes.CDLL(str(tmp_path / "crowd.so"))
    crowd.takes_one.restype, crowd.core_time.restype = ctypes.c_bool, ctypes.c_longlong
    crowd.took.argtypes = [ctypes.c_longlong, ctypes.c_longlong]

    def calls_of_one_thread():
        return next(count for count in range(1000) if not crowd.takes_one())

    assert calls_of_one_thread() == 0
    crowd.took(100, 190)  # nobody waited
    crowd.took(100, 71)
    assert calls_of_one_thread() == 0
    lengths = []
    for _ in range(5):  # one thread would have done it in half the time
        crowd.took(100, 50)
        lengths.append(calls_of_one_thread())
    assert lengths == [4, 16, 32, 32, 32]  # asked for less and less often
    for _ in range(6):
        crowd.took(100, 190)
        assert calls_of_one_thread() == 0
    crowd.took(100, 50)
    assert calls_of_one_thread() == 4  # forgotten

    before = crowd.core_time()
    time.sleep(0.2)
    slept = crowd.core_time()
    while crowd.core_time() < slept + 10**8:
        pass
    assert slept - before < 10**8  # asleep it has no core


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux shows them")
def test_one_thread_writes_the_bits_of_a_team():
    """What a crowded machine makes of a step. OpenMP gives a team of one here, although three are asked for."""
    script = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from hashlib import sha256
from test_decoding import language_model, prefix, steps
torch.set_num_threads(1)
models = [language_model(*sizes, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
          for sizes in ((64, 128, None), (30, 90, 70))]
states = [(model, batch, prefix(model, batch)) for model in models for batch in (1, 3)]
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
for model, batch, state in states:
    hidden, after = steps(model, state, True, torch.arange(3 * batch).view(batch, 3))
    tensors = [hidden, *(tensor for layer in after.layers for tensor in layer)]
    print(sha256(b"".join(tensor.float().numpy().tobytes() for tensor in tensors)).hexdigest())
print(len(os.listdir("/proc/self/task")) - before)
"""
    path = os.pathsep.join([str(Path(visualrwkv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    results = []
    for limit in ({}, {"OMP_THREAD_LIMIT": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PYTHONPATH": path, **limit},
        )
        assert done.returncode == 0, done.stderr
        results.append(done.stdout.split())
    (*team, more), (*alone, none) = results
    assert int(more) > 0 and int(none) == 0
    assert team == alone and len(set(team)) == 8


@needs_kernel
def test_threads_may_change_between_tokens():
    model, tokens = language_model(), torch.randint(50, (2, 3))
    state, before, results = prefix(model, 2), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(steps(model, state.clone(), True, tokens)[0])
    finally:
        torch.set_num_threads(before)
    assert error(results[1], results[0]) < 1e-5 and error(results[2], results[0]) < 1e-5
