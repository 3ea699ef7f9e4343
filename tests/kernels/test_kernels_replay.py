"""Operators make their launches again from memory, and must make those that they would; for a GPU, but run on none."""

import ctypes
import gc
import importlib
import itertools
import random
import weakref

import pytest
import torch
from test_kernels_launch import gpu  # noqa: F401
from torch.fx.experimental.proxy_tensor import make_fx

import fastsample_kernels as fk
from fastsample_kernels import _replay
from fastsample_kernels import _runtime as runtime

attention, dit, forwards, norms = (
    importlib.import_module(f"fastsample_kernels.{name}")
    for name in ("attention", "dit", "_forwards", "group_norm")
)
BF16, F32 = torch.bfloat16, torch.float32


def tensor(*shape, dtype=BF16, kind="plain"):
    if kind == "plain":
        return torch.randn(shape).to(dtype)
    if kind == "offset":  # not at an address that is a multiple of 16
        return torch.randn(torch.Size(shape).numel() + 1).to(dtype)[1:].view(shape)
    if kind == "copied":  # no kernel takes such strides
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    if kind == "sliced":
        return torch.randn(2 * shape[0], *shape[1:]).to(dtype)[::2]
    last = (0, *range(2, len(shape)), 1)
    return torch.randn([shape[i] for i in last]).to(dtype).movedim(-1, 1)


def group_norm(rng, dtype, kind):
    x = tensor(2, 64, 8, rng.choice([8, 512]), dtype=dtype, kind=kind)
    channels, samples = tensor(64, dtype=dtype), tensor(2, 64, dtype=dtype)
    weight, scale = rng.choice([None, channels]), rng.choice([None, samples])
    residual = rng.choice([None, x, tensor(*x.shape, dtype=dtype, kind=kind)])
    return norms._forward, (x, residual, weight, rng.choice([None, channels]), scale, scale, 8, 1e-5, False)


def group_norm_backward(rng, dtype, kind):
    x, gy = (tensor(2, 64, 8, 8, dtype=dtype, kind=kind) for _ in range(2))
    moments = tensor(2, 2, 8, dtype=F32)
    return norms._backward, (gy, x, None, None, None, None, None, moments, 8, rng.random() < 0.5)


def attend(rng, dtype, kind):
    kind = "plain" if kind == "last" else kind
    q = tensor(2, 3, 64, 40, dtype=dtype, kind=kind)
    k, v = (rng.choice([q, tensor(2, 3, rng.choice([64, 77]), 40, dtype=dtype, kind=kind)]),) * 2
    bias = rng.choice([None, tensor(1, 1, 1, k.shape[2], dtype=dtype) > 0])
    return attention._forward, (q, k, v, bias, rng.random() < 0.5, rng.choice([0.1, -0.1]))


def attend_backward(rng, dtype, kind):
    do, q, k, v, o = (tensor(2, 3, 64, 40, dtype=dtype) for _ in range(5))
    lse = tensor(2, 3, 2, 64, dtype=F32)
    bias = tensor(1, 1, 64, 64, dtype=dtype)
    return attention._backward, (do, q, k, v, bias, o, lse, True, 0.1, rng.random() < 0.5)


def norm(rng, dtype, kind):
    x, branch = (tensor(2, 8, 64, dtype=dtype, kind=kind if kind == "offset" else "plain") for _ in range(2))
    gate, vector = tensor(2, 64, dtype=dtype), tensor(64, dtype=dtype)
    branch = rng.choice([None, branch, x])
    gate = None if branch is None else gate
    return dit._norm, (x, branch, gate, vector, None, gate, gate, 1e-6, rng.random() < 0.5)


def norm_backward(rng, dtype, kind):
    h, dy = (tensor(2, 8, 64, dtype=dtype) for _ in range(2))
    return dit._norm_backward, (h, None, dy, None, None, None, None, 1e-6, True, rng.random() < 0.5)


def rope(rng, dtype, kind):
    x = tensor(2, 3, 16, 64, dtype=dtype)
    x = x if rng.random() < 0.5 else x.transpose(1, 2).contiguous().transpose(1, 2)
    angles = tensor(2, 16, 64, dtype=dtype)
    weight = rng.choice([None, tensor(64, dtype=dtype)])
    return dit._rope, (
        x,
        angles,
        rng.choice([angles, tensor(2, 16, 64, dtype=dtype)]),
        weight,
        1e-6,
        True,
        True,
    )


def glu(rng, dtype, kind):
    kind = kind if kind == "offset" else "plain"
    return dit._glu, (tensor(rng.choice([1, 16]), 128, dtype=dtype, kind=kind), rng.choice(["gelu", "silu"]))


QUICK = pytest.param(glu, marks=pytest.mark.quick)
OPERATORS = (group_norm, group_norm_backward, attend, attend_backward, norm, norm_backward, rope, QUICK)


class Called:
    """What a call launches and returns, tensors by what they are: an argument, or the n-th other one."""

    def __init__(self, driver, body, args):
        inputs = [a for a in args if isinstance(a, torch.Tensor)]
        names = {}
        for i, a in enumerate(inputs):
            names.setdefault(a.data_ptr(), f"argument {i}")
        before = len(driver.calls)
        outputs = body(*args)
        self.launches = [
            [self.name(value, names) for value in (*call[:6], *call[9:])] for call in driver.calls[before:]
        ]
        self.outputs = [(self.name(t, names), tuple(t.shape), t.stride(), t.dtype) for t in outputs]

    def name(self, value, names):
        if isinstance(value, torch.Tensor):
            if not value.numel():
                return "nothing"
            value = value.data_ptr()
        if isinstance(value, int) and value > 2**40:  # an address, which Triton takes as well as a tensor
            return names.setdefault(value, f"buffer {len(names)}")
        return f"{type(value).__name__} {value!r}"

    def __eq__(self, other):
        return self.launches == other.launches and self.outputs == other.outputs


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_made_again_is_what_would_be_made(gpu, operator):  # noqa: F811
    kinds = ("plain", "offset", "sliced", "last", "copied")
    forms = list(itertools.product((BF16, F32), kinds, range(4)))
    for form in 2 * forms:  # the second time each is known, as are the others
        body, args = operator(random.Random(str(form)), *form[:2])
        run = body._init_fn
        expected = Called(gpu, run.__wrapped__, args)
        assert expected.launches
        assert Called(gpu, run, args) == expected


@pytest.fixture
def replays(monkeypatch):
    """The calls that were made from memory."""
    made, run = [], _replay._Replay.__call__

    def spy(self, *args):
        made.append(self)
        return run(self, *args)

    monkeypatch.setattr(_replay._Replay, "__call__", spy)
    return made


@pytest.mark.parametrize("operator", [group_norm, group_norm_backward, attend, norm, rope, QUICK])
def test_a_form_is_remembered(gpu, operator, replays):  # noqa: F811
    for i in range(3):
        body, args = operator(random.Random(7), BF16, "plain")
        body._init_fn(*args)
        if i == 0:
            replays.clear()
        assert len(replays) == i


def functions(rng):
    """Calls of the functions that remember, as users write them."""
    dtype, kind = rng.choice((BF16, F32)), rng.choice(("plain", "offset", "sliced", "last", "copied"))
    x, rows = tensor(2, 64, 8, 16, dtype=dtype, kind=kind), tensor(2, 40, 64, dtype=dtype, kind=kind)
    channels, samples = tensor(64, dtype=dtype), tensor(2, 64, dtype=dtype)
    tokens, angles = tensor(2, 40, 64, dtype=dtype), tensor(40, 64, dtype=F32)
    heads = tensor(2, 3, 40, 64, dtype=dtype, kind="plain" if kind == "last" else kind)
    p, m = rng.choice((None, channels)), rng.choice((None, samples, tokens, samples[:, None]))
    scale = rng.choice((None, samples))
    residual = rng.choice((None, x, tensor(2, 64, 8, 16, dtype=rng.choice((BF16, F32)))))
    activation, interleaved = rng.choice((None, "silu")), rng.random() < 0.5
    wide = rng.choice((None, samples[..., None, None]))
    chunks = tensor(2, 1, 3 * 64, dtype=dtype).chunk(3, -1)  # as adaptive norms make them, of one tensor
    gate, modulation = chunks[0], rng.choice((chunks[1:], chunks[1:2], (chunks[1], chunks[1])))
    return [
        (fk.group_norm, (x, 8, p), {"activation": activation, "scale": scale, "residual": residual}),
        (fk.layer_norm, (rows, p, p), {"scale": m, "shift": m}),
        (fk.layer_norm, (rows,), {"scale": samples}),
        (fk.layer_norm, (rows,), {"shift": samples}),  # of the same form, but for the name
        (fk.rms_norm, (rows,), {"weight": p, "shift": m}),
        (fk.gated_residual_norm, (rows, tokens, m), {"scale": m, "norm": "rms"}),
        (fk.norm_rope, (heads, angles, angles, p), {"interleaved": interleaved}),
        (fk.geglu, (rows,), {"approximate": "tanh"}),
        (fk.swiglu, (rows,), {}),
        # what patched modules call
        (forwards._grouped, (x, 8, p, p, 1e-5, "silu", wide, wide), {}),
        (forwards._normed, (forwards.LayerNorm, rows, 64, p, p, 1e-5, *modulation), {}),
        (forwards._normed, (forwards.DiffusersRMSNorm, heads, 64, p, None, 1e-6), {}),
        (forwards._gated, (forwards.RMSNorm, rows, gate, tokens, 64, p, None, None, *modulation), {}),
        (forwards._gated_unit, (rows, rng.choice(("gelu", "gelu_tanh", "silu"))), {}),
    ]


@pytest.mark.quick
def test_functions_make_again_what_they_would_make(gpu, replays, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runtime, "_why_not_device", lambda *args: None)
    for form in 2 * list(range(12)):
        for function, args, kwargs in functions(random.Random(form)):
            every = [*args, *kwargs.values()]

            def call(*given, function=function, names=tuple(kwargs)):
                named = len(given) - len(names)
                result = function(*given[:named], **dict(zip(names, given[named:], strict=True)))
                return (result,) if isinstance(result, torch.Tensor) else result

            with monkeypatch.context() as patch:
                patch.setattr(_replay, "REMEMBERS", False)
                expected = Called(gpu, call, every)
            assert expected.launches
            assert Called(gpu, call, every) == expected
    assert len(replays) > 14 * 12 * 0.9  # but for those that change types


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:.*jit.*:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_functions_run_themselves_where_more_than_their_result_matters(gpu, replays, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runtime, "_why_not_device", lambda *args: None)
    x = tensor(2, 24, 64, dtype=F32)
    for _ in range(2):
        plain = fk.layer_norm(x)
    assert len(replays) == 1
    replays.clear()
    assert fk.layer_norm(x.clone().requires_grad_()).requires_grad
    assert torch.func.vmap(fk.layer_norm)(torch.stack([x, x])).shape == (2, *x.shape)
    assert torch.func.jvp(fk.layer_norm, (x,), (x,))[1].shape == x.shape
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert torch.autograd.forward_ad.unpack_dual(fk.layer_norm(dual)).tangent is not None
    traced = torch.jit.trace(lambda x: fk.layer_norm(x) + 0, (x,), check_trace=False)
    assert "fastsample_kernels::norm" in str(traced.graph)
    traced = make_fx(lambda x: fk.layer_norm(x))(x)
    assert "fastsample_kernels.norm" in traced.code
    compiled = torch.compile(fk.layer_norm, fullgraph=True, backend="eager")
    assert compiled(x).shape == plain.shape
    assert fk.layer_norm(x, eps=torch.tensor(1e-5).item()).shape == x.shape
    with pytest.raises(ValueError, match="weight has shape") as error:
        fk.layer_norm(x, x)
    assert error.value.__context__ is None  # no word of what is remembered
    with pytest.raises(TypeError):
        fk.layer_norm(x, eps=[])
    assert not [r for r in replays if r.single]  # the operator's own are of a tuple


@pytest.mark.quick
def test_a_form_is_all_that_a_function_looks_at(gpu, replays, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runtime, "_why_not_device", lambda *args: None)
    x, heads, angles = (
        tensor(2, 24, 40, dtype=F32),
        tensor(2, 3, 20, 40, dtype=F32),
        tensor(20, 40, dtype=F32),
    )
    fk.group_norm(x, 8)
    with pytest.raises(ValueError, match="is a float"):
        fk.group_norm(x, 8.0)
    with torch.no_grad():
        for cos in (angles, angles.clone().requires_grad_()):
            fk.norm_rope(heads, cos, angles.clone())
        assert len(replays) == 1
        fk.layer_norm(torch._neg_view(x))  # whose memory has other signs
        fk.layer_norm(torch._neg_view(x))
        assert not [r for r in replays[1:] if r.single]


@pytest.mark.quick
def test_inference_mode_remembers_too(gpu, replays, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runtime, "_why_not_device", lambda *args: None)
    image = tensor(2, 56, 5, 8).permute(0, 2, 3, 1).flatten(1, 2)
    x = tensor(2, 3, 5, 56)
    for mode in (torch.inference_mode, torch.no_grad):
        replays.clear()
        with mode():
            for i in range(3):
                for rows in (x, image):
                    fk.layer_norm(rows, scale=tensor(2, 56))
                fk.geglu(x)
                assert len([r for r in replays if r.single]) == 3 * i


@pytest.mark.quick
def test_a_device_without_kernels_is_not_asked_for_its_driver(monkeypatch):
    monkeypatch.setattr(runtime, "_why_not_device", lambda *args: "compute capability (7, 5) is below (8, 0)")
    monkeypatch.setattr(runtime, "launcher", lambda: pytest.fail("Triton was started"))
    x = tensor(2, 24, 40, dtype=F32)
    torch.testing.assert_close(fk.layer_norm(x), torch.nn.functional.layer_norm(x, (40,)))


def test_through_the_functions(gpu, replays, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runtime, "_why_not_device", lambda *args: None)
    for _ in range(2):
        x = tensor(2, 24, 8, 8)
        with torch.no_grad():
            fk.group_norm(x, 3, activation="silu")
        fk.group_norm(x.requires_grad_(), 3, activation="silu")[0].sum().backward()
    assert len(replays) == 3  # of the function, and of the operator's forward and backward


@pytest.mark.quick
def test_what_does_more_than_launch_is_not_made_again(gpu, replays):  # noqa: F811
    q = tensor(2, 3, 64, 40)
    for _ in range(2):
        attention._forward._init_fn(q, q, q, None, False, -0.1)  # -q
    assert not replays


@pytest.mark.quick
@pytest.mark.parametrize("rows", [False, True])
def test_what_was_copied_is_copied_again(gpu, replays, monkeypatch, rows):  # noqa: F811
    monkeypatch.setattr(runtime, "_why_not_device", lambda *args: None)
    read = []

    def start(compiled, grid, stream, passed):
        address = next(value for value in passed if isinstance(value, int) and value > 2**40)
        read.append(ctypes.string_at(address, 2 * x.numel()))

    monkeypatch.setattr(_replay, "start", start)
    for i in range(3):
        if rows:  # of a picture, as transformers within UNets see them
            x = tensor(2, 72, 5, 8).permute(0, 2, 3, 1).flatten(1, 2)
            fk.layer_norm(x)
        else:
            x = tensor(2, 64, 8, 24, kind="copied")
            norms._forward._init_fn(x, None, None, None, None, None, 8, 1e-5, False)
        assert len(replays) == i
    assert read[-1] == x.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.quick
def test_work_of_pytorch_on_a_buffer_is_not_left_out(gpu, replays):  # noqa: F811
    @_replay.replayed()
    def body(x):
        y = runtime.empty(x.shape, x.dtype, x.device)
        y.zero_()  # no launch of ours, and the output is a buffer that would be found
        return (y,)

    for _ in range(2):
        assert not body(tensor(4, 64))[0].any()
    assert not replays


@pytest.mark.quick
def test_a_profiler_sees_all_launches(gpu, replays, monkeypatch):  # noqa: F811
    body, args = glu(random.Random(0), BF16, "plain")
    body._init_fn(*args)
    replays.clear()
    seen = []
    kernel = importlib.import_module("fastsample_kernels._dit_kernels").glu_forward
    monkeypatch.setattr(kernel, "pre_run_hooks", [lambda *args, **kwargs: seen.append(args)])
    body._init_fn(*args)
    assert len(seen) == 1
    assert not replays


@pytest.mark.quick
def test_nothing_is_kept_alive(gpu):  # noqa: F811
    body, args = rope(random.Random(3), F32, "plain")
    kept = [weakref.ref(a) for a in args if isinstance(a, torch.Tensor)]
    kept += [weakref.ref(out) for out in body._init_fn(*args)]
    kept += [weakref.ref(out) for out in body._init_fn(*args)]
    gpu.calls.clear()
    del args
    gc.collect()
    assert not any(ref() is not None for ref in kept)


@pytest.mark.quick
def test_an_error_ends_the_recording(gpu):  # noqa: F811
    with pytest.raises(ZeroDivisionError):
        norms._forward._init_fn(tensor(2, 64, 8, 8), None, None, None, None, None, 0, 1e-5, False)
    assert runtime.recording.recorder is None


@pytest.mark.quick
def test_parts_of_scratch_memory_do_not_overlap():
    with _replay.Recorder() as recorder:
        sizes = [(3, F32), (1000, BF16), (0, F32), (64, F32), (65, F32), (7, torch.uint8)]
        buffers = [runtime.empty((n,), dtype, torch.device("cpu")) for n, dtype in sizes]
    replay = _replay._replay_of(recorder, [torch.ones(2)], buffers[3].view(8, 8))
    rest = [n * dtype.itemsize for n, dtype in sizes[:3] + sizes[4:]]
    ends = [*replay.offsets[1:], replay.scratch]
    for start, end, size in zip(replay.offsets, ends, rest, strict=True):
        assert start % 256 == 0
        assert end >= start + size
    assert replay.outputs == [((8, 8), F32, (8, 1))]


@pytest.mark.quick
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_copy_is_noted_with_its_format(mode):
    x = torch.randn(2, 3, 4, 5)
    with mode(), _replay.Recorder() as recorder:
        x.contiguous(memory_format=torch.channels_last)
        x.transpose(1, 2).contiguous()
        x.contiguous()  # none
    assert [layout for _, layout, _ in recorder.copies] == [torch.channels_last, torch.contiguous_format]
    assert recorder.complete
