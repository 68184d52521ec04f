# SPDX-License-Identifier: MIT
"""What nanopeft/adamw.py claims, held against torch.optim, plain formulas in fp64, and itself run another way."""

import copy
import functools
import io
import math
import multiprocessing
import runpy
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopeft import adamw
from nanopeft.adamw import AdamW, Error, adamw_step


def often(few=20, many=150, **strategies):
    """A property that is drawn a few times by default, and many times in the thorough run."""

    def decorate(property_):
        @pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.thorough)])
        def test(examples):
            settings(deadline=None, max_examples=examples)(given(**strategies)(property_))()

        test.__name__, test.__doc__ = property_.__name__, property_.__doc__
        return test

    return decorate


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)  # () is a scalar; a 0 makes it empty
narrow_types = st.sampled_from([torch.bfloat16, torch.float16])


def parameters(shapes, seed, dtype=torch.float64):
    """Parameters of these shapes with normal values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def gradients(params, step, scale=1.0):
    """What the gradients of these parameters are at this step: normal values, other ones at each step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


def train(optimizer, params, steps, **how):
    """The given steps (a range), and the parameters after them."""
    for step in steps:
        gradients(params, step)
        optimizer.step(**how)
    return [p.detach().clone() for p in params]


def same(left, right):
    """Equal to the last bit, dtype included."""
    return len(left) == len(right) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right))


setting = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-5, 1.0),
        "eps": st.floats(-10, -1).map(lambda x: 10**x),
        "weight_decay": st.just(0.0) | st.floats(0, 1.0),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
    }
)


# In fp64 one rounding is 1.1e-16. A step has some ten of them on a quotient of at most √8 = 2.8 (all of m from the last
# of 8 gradients, an eighth of v), and lr is at most 1: 8 steps stay below 8 x 10 x 2.8 x 1.1e-16 = 2.5e-14, unless
# Adam's g + λθ nearly cancels, which magnifies what came before by |g| / |g + λθ|. The rest of 1e-12 is for that.
several = st.lists(shapes, min_size=1, max_size=3)
decoupling, seeds = st.booleans(), st.integers(0, 99)


@often(decoupled=decoupling, shapes=several, setting=setting, steps=st.integers(1, 8), seed=seeds)
def test_equals_torch(decoupled, shapes, setting, steps, seed):
    """In fp64 AdamW and the plain adamw_step give torch.optim.AdamW's parameters; with decoupled=False Adam's."""
    ours, theirs, plain = (parameters(shapes, seed) for _ in range(3))
    oracle = torch.optim.AdamW if decoupled else torch.optim.Adam
    train(AdamW(ours, decoupled=decoupled, **setting), ours, range(steps))
    train(oracle(theirs, foreach=False, **setting), theirs, range(steps))
    states = [(p.detach(), torch.zeros_like(p), torch.zeros_like(p)) for p in plain]
    for t in range(steps):
        gradients(plain, t)
        states = [adamw_step(x, p.grad, m, v, t + 1, decoupled=decoupled, **setting)
                  for p, (x, m, v) in zip(plain, states)]  # fmt: skip
    for a, b, (c, _, _) in zip(ours, theirs, states):
        assert a.dtype == c.dtype == torch.float64
        assert (a - b).abs().le(1e-12 * b.abs().clamp(min=1)).all()
        assert (c - b).abs().le(1e-12 * b.abs().clamp(min=1)).all()


def test_defaults_are_torchs():
    """Without any setting it is torch.optim.AdamW without any setting."""
    ours, theirs = parameters([(9,)], 0), parameters([(9,)], 0)
    train(AdamW(ours), ours, range(5))
    train(torch.optim.AdamW(theirs), theirs, range(5))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)  # 1e-3 a step: far below the bound above


@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
def test_fp32_is_as_exact_as_torchs(decoupled):
    """In fp32 it is no farther from the fp64 result than twice torch's own fp32 implementation is."""
    setting = dict(lr=1e-2, weight_decay=0.1)
    runs = {}
    for name, dtype, make in (
        ("exact", torch.float64, torch.optim.AdamW if decoupled else torch.optim.Adam),
        ("torch", torch.float32, torch.optim.AdamW if decoupled else torch.optim.Adam),
        ("ours", torch.float32, lambda *a, **k: AdamW(*a, decoupled=decoupled, **k)),
    ):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters([(64, 64)], 0, torch.float32)]
        optimizer = make(params, **setting)
        for step in range(20):
            gradients(params, step)
            params[0].grad = params[0].grad.float().to(dtype)  # the fp64 run sees the numbers that the fp32 runs see
            optimizer.step()
        runs[name] = params[0].detach().double()
    ours, torchs = ((runs[name] - runs["exact"]).abs() for name in ("ours", "torch"))
    # Both round some ten times a step in another order: the same distribution of errors. Over 4,096 weights its mean is
    # known to 2 %; the largest of them is left a factor of 4.
    assert 0 < ours.mean() < 2 * torchs.mean()
    assert ours.max() < 4 * torchs.max()


@often(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    chunk=st.integers(1, 40), n=st.integers(0, 200), seed=seeds,
)  # fmt: skip
def test_chunks_do_not_show(dtype, chunk, n, seed):
    """Where a parameter is cut into chunks changes nothing but the last bit, whatever does not divide what."""
    whole, cut = parameters([(n,)], seed, dtype), parameters([(n,)], seed, dtype)
    train(AdamW(whole, lr=0.1), whole, range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "CHUNK", chunk)
        train(AdamW(cut, lr=0.1), cut, range(3))
    # torch's vector loops and the scalar loop for what is left over may round differently (fused multiply-add): 3 steps
    # of 0.1 with a few roundings of m, v and θ each, on numbers of up to about 4. A bf16 θ may fall to its neighbour.
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(cut, whole, rtol=rounding if dtype == torch.bfloat16 else 0, atol=8 * rounding)


def test_larger_than_a_chunk():
    """A parameter of several real chunks and a part of one gets torch's numbers in each of them."""
    n = 3 * adamw.CHUNK * torch.get_num_threads() + 12_345
    ours, theirs = parameters([(n,)], 0), parameters([(n,)], 0)
    train(AdamW(ours, lr=0.1), ours, range(2))
    train(torch.optim.AdamW(theirs, lr=0.1), theirs, range(2))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)  # 2 steps of 0.1 with ten roundings: 2e-16 typically


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 3), lambda x: x[:, ::2], lambda x: x.to(memory_format=torch.channels_last), lambda x: x],
    ids=["transposed", "every second", "channels last", "contiguous"],
)
@pytest.mark.parametrize("chunk", [adamw.CHUNK, 50], ids=["one piece", "cut"])
def test_any_strides(view, dtype, chunk, monkeypatch):
    """A parameter or gradient that is not contiguous is updated like its contiguous copy, and stays where it is."""
    monkeypatch.setattr(adamw, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    odd = torch.nn.Parameter(view(torch.randn(4, 6, 2, 8, generator=generator).to(dtype)))
    plain = torch.nn.Parameter(odd.detach().clone(memory_format=torch.contiguous_format))
    place, before = (odd.stride(), odd.data_ptr()), plain.detach().clone()
    one, two = AdamW([odd], lr=0.1), AdamW([plain], lr=0.1)
    for step in range(4):
        gradients([plain], step)
        if step == 3:
            plain.grad = plain.grad[:1, :1].expand(odd.shape)  # strides of 0, what x.mean().backward() leaves
        odd.grad = plain.grad if step % 2 else torch.empty_like(odd).copy_(plain.grad)  # as the parameter, or not
        one.step(), two.step()
    assert torch.equal(odd, plain) and not torch.equal(odd, before)
    assert (odd.stride(), odd.data_ptr()) == place


def compare_compiled(dtype, backend):
    torch.compile = functools.partial(torch.compile, backend=backend)
    shapes = [(3, adamw.CHUNK), (2, adamw.CHUNK + 1), (5,)]
    plain, compiled = parameters(shapes, 0, dtype), parameters(shapes, 0, dtype)
    optimizers = AdamW(plain), AdamW(compiled, compile=True)
    for step in range(12):
        for params, optimizer in zip((plain, compiled), optimizers):
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            gradients(params, step)
            optimizer.step(grad_scale=1 / (step + 1))
    for a, b in zip(plain, compiled):
        x, y = (o.state[p].get("master", p) for o, p in zip(optimizers, (a, b)))
        # One rounding is 6e-8. Each of 12 steps has one on θ, and some ten on lr (1e-3) times a ratio of at most 7.27
        assert (x - y).abs().le(12 * (6e-8 * x.abs() + 10 * 6e-8 * 7.3e-3)).all()
        assert torch.equal(y.to(dtype), b)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


# "eager" traces as torch.compile's own backend does, and runs torch's operations: it needs no C++ compiler
@pytest.mark.parametrize(
    "dtype, backend",
    [(torch.bfloat16, "eager")]
    + [pytest.param(dtype, "inductor", marks=pytest.mark.thorough) for dtype in (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_compiled(dtype, backend):
    """compile=True gives the numbers of the plain loop, and compiles a few times, not for each lr, step or shape."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    # In a process of its own: torch.compile leaves tensors without memory behind, which other tests would count
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(compare_compiled, dtype, backend).result(timeout=300)


def test_groups():
    """Each parameter group follows its own settings, one added later too."""
    ours, theirs = parameters([(5,), (3, 2), (4,)], 0), parameters([(5,), (3, 2), (4,)], 0)
    second = dict(lr=0.3, betas=(0.5, 0.7), eps=1e-2, weight_decay=0.5)

    def make(cls, params, **extra):
        optimizer = cls([{"params": params[0]}, {"params": params[1:2], **second}], lr=1e-2, **extra)
        optimizer.add_param_group({"params": params[2], "lr": 0.5})
        return optimizer

    train(make(AdamW, ours), ours, range(4))
    train(make(torch.optim.AdamW, theirs), theirs, range(4))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_what_tells_adam_from_adamw():
    """With g = 0, θ = 1, lr = λ = 0.1 Adam's decay is normalized to a full step of lr, AdamW's is lr λ; by group."""
    a, b = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    AdamW([{"params": a, "decoupled": False}, {"params": b}], lr=0.1, weight_decay=0.1).step()
    # Adam: 0.1 * 0.1 / (0.1 + 1e-8) falls short of 0.1 by 1e-8
    assert (a.item(), b.item()) == (pytest.approx(0.9, abs=1.1e-8), pytest.approx(0.99, abs=1e-15))


def test_without_a_gradient():
    """A parameter without a gradient does not move, decay included, holds no state, and starts at step 1 later on."""
    ours, theirs = parameters([(3,), (2,)], 0), parameters([(3,), (2,)], 0)
    one, two = AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    before = ours[1].detach().clone()
    for step in range(4):
        for params, optimizer in ((ours, one), (theirs, two)):
            gradients(params, step)
            if step < 2:
                params[1].grad = None
            optimizer.step()
        if step < 2:
            assert torch.equal(ours[1], before) and ours[1] not in one.state
    assert one.state[ours[1]]["step"] == 2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_closure():
    """The closure runs once, with gradients enabled, before the update, and its loss is returned."""
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer, calls = AdamW([p], lr=0.1, weight_decay=0), []

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        calls.append(p.item())
        return loss

    assert optimizer.step(closure).item() == 4.0 and calls == [2.0]
    assert p.item() == pytest.approx(1.9, abs=1e-6)
    assert optimizer.step() is None


@often(dtype=narrow_types, shapes=several, setting=setting, steps=st.integers(1, 6), seed=seeds)
def test_16_bits_is_the_fp32_run_rounded_once(dtype, shapes, setting, steps, seed):
    """A 16-bit parameter is at each step the fp32 run on the same gradients, rounded: no error of its type adds up."""
    rounded = parameters(shapes, seed, dtype)
    exact = [torch.nn.Parameter(p.detach().float()) for p in rounded]
    one, two = AdamW(rounded, **setting), AdamW(exact, **setting)
    for step in range(steps):
        gradients(rounded, step)
        for p, q in zip(rounded, exact):
            q.grad = p.grad.float()
        one.step(), two.step()
        assert same(rounded, [q.to(dtype) for q in exact])
        assert same([one.state[p]["master"] for p in rounded], exact)


@pytest.mark.parametrize("dtype, lost", [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)], ids=str)
def test_small_updates_count(dtype, lost):
    """Updates too small for 16 bits move the parameter in the end: a thousand of 1e-5 on 0.1 make 0.01."""
    p = torch.nn.Parameter(torch.full((1,), 0.1, dtype=dtype))
    assert torch.equal(p - 1e-5, p) and torch.equal(p - 0.1 * lost, p)  # lost without the master copy
    optimizer = AdamW([p], lr=1e-5, weight_decay=0)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # half a spacing of the 16-bit type, and a thousand roundings of fp32
    tolerance = 0.1 * (torch.finfo(dtype).eps / 2 + 1000 * 2**-24)
    assert p.item() == pytest.approx(torch.tensor(0.1, dtype=dtype).item() - 0.01, abs=tolerance)


def through_file(state):
    """What torch.save wrote and torch.load reads, weights_only so that no code comes along."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("through", [through_file, copy.deepcopy, lambda state: state], ids=["file", "copy", "live"])
def test_resume_is_exact(through, dtype):
    """Stopped, saved and loaded into a fresh optimizer, a run gives to the last bit what it gives without a stop."""
    shapes, setting = [(7, 3), (), (0,), (50,)], dict(lr=0.05, weight_decay=0.1)
    straight = parameters(shapes, 0, dtype)
    expected = train(
        AdamW([{"params": straight[:1], "lr": 0.5}, {"params": straight[1:]}], **setting), straight, range(9)
    )

    first = parameters(shapes, 0, dtype)
    optimizer = AdamW([{"params": first[:1], "lr": 0.5}, {"params": first[1:]}], **setting)
    train(optimizer, first, range(4))
    state = through(optimizer.state_dict())
    held = copy.deepcopy(optimizer.state_dict()["state"])

    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    fresh = AdamW([{"params": second[:1]}, {"params": second[1:]}])  # the settings come from the state
    fresh.load_state_dict(state)
    assert same(train(fresh, second, range(4, 9)), expected)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for entry in fresh.state_dict()["state"].values():
        tensors = {k: x for k, x in entry.items() if k != "step"}
        assert tensors.keys() == ({"m", "v"} if dtype == wide else {"m", "v", "master"}) and entry["step"] == 9
        assert all(x.dtype == wide for x in tensors.values())
    for i, entry in held.items():  # what was loaded is a copy: the source has not moved
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(state["state"][i][k])) for k, x in entry.items())


def test_torchs_loading_would_not_resume():
    """With torch's own load_state_dict the master copy is rounded to 16 bits, so ours is needed."""
    params = parameters([(50,)], 0, torch.bfloat16)
    optimizer = AdamW(params)
    train(optimizer, params, range(2))
    torch.optim.Optimizer.load_state_dict(optimizer, optimizer.state_dict())
    assert optimizer.state[params[0]]["master"].dtype == torch.bfloat16


def test_a_state_of_fp32_goes_on_in_fp64():
    """Loaded for parameters of another width, m and v take theirs: the next step is fp64's own."""
    saved = parameters([(3,)], 0, torch.float32)
    optimizer = AdamW(saved)
    train(optimizer, saved, range(1))
    params = parameters([(3,)], 0, torch.float64)
    fresh = AdamW(params)
    fresh.load_state_dict(optimizer.state_dict())
    assert {fresh.state[params[0]][key].dtype for key in "mv"} == {torch.float64}
    train(fresh, params, range(1))


def test_resume_with_a_parameter_that_had_no_gradient():
    """A parameter that held no state when the run was saved holds none after loading, and can start later."""
    params = parameters([(3,), (2,)], 0)
    optimizer = AdamW(params)
    gradients(params[:1], 0)
    optimizer.step()
    fresh = AdamW(params)
    fresh.load_state_dict(optimizer.state_dict())
    assert params[0] in fresh.state and params[1] not in fresh.state
    train(fresh, params, range(1))
    assert (fresh.state[params[0]]["step"], fresh.state[params[1]]["step"]) == (2, 1)


@pytest.mark.parametrize("wrong", ["torch's", "shape", "no master"])
def test_refuses_a_state_that_does_not_fit(wrong):
    """A state of another optimizer, shape or precision is refused, with what would fit, and nothing of it is loaded."""
    dtype = torch.float32
    saved = parameters([(4,)] if wrong == "shape" else [(3,)], 0, dtype)
    optimizer = (torch.optim.AdamW if wrong == "torch's" else AdamW)(saved)
    train(optimizer, saved, range(1))
    params = parameters([(3,)], 0, torch.bfloat16 if wrong == "no master" else dtype)
    mine = AdamW(params, lr=0.5)
    train(mine, params, range(1))
    before = mine.state_dict()
    with pytest.raises(Error, match=f"the state of parameter 0, {params[0].dtype}, must have"):
        mine.load_state_dict(optimizer.state_dict())
    assert mine.state[params[0]] is before["state"][0] and mine.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "dtype, expected", [(torch.float32, 16), (torch.bfloat16, 16), (torch.float16, 16), (torch.float64, 32)], ids=str
)
def test_bytes(dtype, expected):
    """Parameter, gradient and state take 16 bytes for each weight, in fp32 and in 16 bits alike (fp64: 32)."""
    params = parameters([(10, 10)], 0, dtype)
    optimizer = AdamW(params)
    train(optimizer, params, range(2))
    live = [params[0], params[0].grad, *(x for x in optimizer.state[params[0]].values() if torch.is_tensor(x))]
    assert sum(x.untyped_storage().nbytes() for x in live) == 100 * expected
    assert len({x.data_ptr() for x in live}) == len(live)


@often(decoupled=decoupling, scale=st.floats(1e-6, 1e6), seed=seeds)
def test_grad_scale(decoupled, scale, seed):
    """grad_scale=s updates as if the gradients had been multiplied by s, leaves them as they are, and not the decay."""
    ours, theirs = parameters([(3, 4), (5,)], seed), parameters([(3, 4), (5,)], seed)
    one = AdamW(ours, lr=0.1, weight_decay=0.3, eps=1e-3, decoupled=decoupled)
    two = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, lr=0.1, weight_decay=0.3, eps=1e-3)
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step, scale)
        kept = [p.grad.clone() for p in ours]
        one.step(grad_scale=torch.tensor(scale, dtype=torch.float64) if step else scale)
        two.step()
        assert same([p.grad for p in ours], kept)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)  # as derived for test_equals_torch


def test_clips_like_clip_grad_norm():
    """Clipping with torch.nn.utils.clip_grad_norm_ and then stepping is stepping with grad_scale = limit / norm."""
    clipped, scaled = parameters([(3, 4), (5,)], 0), parameters([(3, 4), (5,)], 0)
    one, two = AdamW(clipped, lr=0.1, eps=0.1), AdamW(scaled, lr=0.1, eps=0.1)
    for step in range(3):
        gradients(clipped, step, 10.0)
        gradients(scaled, step, 10.0)
        norm = torch.nn.utils.clip_grad_norm_(clipped, 0.5)
        assert norm > 5
        one.step()
        two.step(grad_scale=0.5 / (norm + 1e-6))
    torch.testing.assert_close(clipped, scaled, rtol=0, atol=1e-14)  # 3 steps of 0.1 with ten roundings


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=8),  # also sets β1
    ],
    ids=["LambdaLR", "OneCycleLR"],
)
@pytest.mark.filterwarnings("error")
def test_schedulers(schedule):
    """torch's schedulers drive it as they drive torch.optim.AdamW, without a warning."""
    runs = []
    for cls in (AdamW, torch.optim.AdamW):
        params = parameters([(5,)], 0)
        optimizer = cls(params, lr=0.1, weight_decay=0.2)
        scheduler = schedule(optimizer)
        for step in range(7):
            gradients(params, step)
            optimizer.step()
            scheduler.step()
        runs.append(params)
    torch.testing.assert_close(*runs, rtol=0, atol=1e-13)  # 7 steps of at most 0.3 with ten roundings


def test_grad_scale_acts_in_fp32():
    """A factor that would push an fp16 gradient below its smallest number acts in fp32, where nothing is lost."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float16))
    p.grad = torch.full((1,), 3.0, dtype=torch.float16)
    assert (p.grad * 2.0**-30).item() == 0
    optimizer = AdamW([p], eps=0)
    optimizer.step(grad_scale=2.0**-30)
    # (1 - β1) g: 0.1 and the product are rounded once each in fp32
    assert optimizer.state[p]["m"].item() == pytest.approx(0.1 * 3 * 2.0**-30, rel=2**-22)


@pytest.mark.parametrize(
    "setting",
    [{"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"eps": -1e-9}, {"weight_decay": -0.1}, {"betas": (1.0, 0.9)},
     {"betas": (0.9, -0.1)}, {"betas": (0.9, math.nan)}],
    ids=str,
)  # fmt: skip
def test_refuses_impossible_settings(setting):
    """A setting outside its range is refused by name, for the optimizer, for one group, and for a group added later."""
    p, q = parameters([(1,), (1,)], 0)
    assert issubclass(Error, ValueError)  # which torch.optim raises
    message = rf"^{next(iter(setting))} must be at least 0 and below (1|inf), not \S+$"
    with pytest.raises(Error, match=message):
        AdamW([p], **setting)
    with pytest.raises(Error, match=message):
        AdamW([{"params": [p]}, {"params": [q], **setting}])
    optimizer = AdamW([p])
    with pytest.raises(Error, match=message):
        optimizer.add_param_group({"params": [q], **setting})
    assert len(optimizer.param_groups) == 1


def test_refuses_sparse_and_complex():
    """A sparse gradient and a complex parameter are refused in one line, before anything has moved."""
    table = torch.nn.Embedding(5, 2, sparse=True)
    before = table.weight.detach().clone()
    table(torch.tensor([1, 2])).sum().backward()
    optimizer = AdamW(table.parameters())
    with pytest.raises(Error, match="^gradients must be dense and real, not torch.sparse_coo of torch.float32$"):
        optimizer.step()
    assert torch.equal(table.weight, before) and not optimizer.state
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.abs().sum().backward()
    with pytest.raises(Error, match="^gradients must be dense and real, not torch.strided of torch.complex64$"):
        AdamW([p]).step()


@often(g=st.floats(-1e3, 1e3).filter(lambda g: abs(g) > 1e-12), eps=st.floats(-12, -1).map(lambda x: 10**x))
def test_first_step(g, eps):
    """The first step is lr |g| / (|g| + ε) against the gradient: lr, whatever the gradient's size, where ε is small."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    p.grad = torch.full_like(p, g)
    AdamW([p], lr=0.01, eps=eps).step()
    # 1 - β2^1 = 0.001 is a difference of numbers near 1, so it is known to 1.1e-16 / 0.001 of itself; its root enters
    assert p.item() == pytest.approx(-0.01 * g / (abs(g) + eps), rel=1e-13)


def test_two_steps_by_hand():
    """The docstring's table: θ = 1, g = 0.5 and then 0.1, lr = λ = 0.1 give θ = 0.89 and 0.8008, and these m and v."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.1)
    for g, m, v, theta in ((0.5, 0.05, 0.00025, 0.89), (0.1, 0.055, 0.00025975, 0.8008)):
        p.grad = torch.full_like(p, g)
        optimizer.step()
        found = optimizer.state[p]["m"].item(), optimizer.state[p]["v"].item(), p.item()
        assert found == pytest.approx((m, v, theta), rel=1e-5)  # θ is written with four digits


def last_step(gradients, betas=(0.9, 0.999), silent=0):
    """The last step in units of lr, after this many gradients of 0, which leave m and v at 0."""
    theta = m = v = torch.zeros((), dtype=torch.float64)
    for t, g in enumerate(gradients, silent + 1):
        before = theta
        theta, m, v = adamw_step(theta, g, m, v, t, lr=1, betas=betas, eps=0, weight_decay=0)
    return (before - theta).item()


def largest_step(beta1, beta2):
    return (1 - beta1) / math.sqrt(1 - beta2) / math.sqrt(1 - beta1**2 / beta2)


def test_a_sudden_gradient_moves_farther_than_lr():
    """A spike after 500 tiny gradients moves θ by 1.99 lr, after many thousands 3.16 lr; growing ones by up to 7.27."""
    assert last_step([7.0]) == pytest.approx(1) and last_step([0.3] * 50) == pytest.approx(1)
    assert last_step([1.0, -1.0]) < 0.1
    assert last_step([1e-9] * 500 + [1]) == pytest.approx(1.99, abs=0.005)
    assert last_step([1], silent=10**5) == pytest.approx(0.1 / math.sqrt(0.001), rel=1e-6)
    assert last_step([(0.999 / 0.9) ** k for k in range(-300, 1)], silent=10**5) == pytest.approx(7.27, abs=0.001)
    assert largest_step(0.9, 0.999) == pytest.approx(7.27, abs=0.001)
    assert largest_step(0.9, 0.95) == pytest.approx(1.16, abs=0.005)


@often(
    gradients=st.lists(st.floats(-1, 1).filter(lambda g: abs(g) > 1e-9), min_size=1, max_size=40),
    growth=st.floats(0.9, 1.5), beta1=st.floats(0, 0.95), beta2=st.floats(0.91, 0.9999), silent=st.integers(0, 10**5),
)  # fmt: skip
def test_no_gradients_move_farther_than_the_bound(gradients, growth, beta1, beta2, silent):
    """No sequence moves θ in a step by more than (1 - β1) / √(1 - β2) / √(1 - β1²/β2) times lr, if β1² < β2."""
    step = last_step([g * growth**k for k, g in enumerate(gradients)], (beta1, beta2), silent)
    # By Cauchy and Schwarz; the bias corrections only lower it, as (1 - a)(1 - b) <= (1 - √(ab))² for a = (β1²/β2)^t,
    # b = β2^t. 1 - β2^t is known to 1e-16 / (1 - β2), here 1e-12.
    assert abs(step) <= largest_step(beta1, beta2) * (1 + 1e-9)


def test_without_bias_correction_the_first_step_is_too_large():
    """After one gradient m / √v, uncorrected, is (1 - β1) / √(1 - β2) = 3.16, where m̂ / √v̂ is 1."""
    _, m, v = adamw_step(torch.zeros(1), torch.full((1,), 0.02), torch.zeros(1), torch.zeros(1), 1)
    assert (m / v.sqrt()).item() == pytest.approx(3.16, abs=0.005)


def test_a_zero_gradient_is_not_none():
    """With a gradient of 0 a parameter decays and goes on by what is left in m; with None it stays."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before, p.grad = p.item(), torch.zeros_like(p)
    optimizer.step()
    m_hat, v_hat = 0.09 / (1 - 0.9**2), 0.000999 / (1 - 0.999**2)
    assert p.item() == pytest.approx(before * 0.99 - 0.1 * m_hat / math.sqrt(v_hat), rel=1e-7)  # ε is 1e-8
    before, p.grad = p.item(), None
    optimizer.step()
    assert p.item() == before


def test_demonstration(capsys):
    """Run as a program the file prints what its docstring claims."""
    runpy.run_path(adamw.__file__, run_name="__main__")
    printed = capsys.readouterr().out
    for claim in ("0.8008 after two steps", "Adam + L2: theta = 0.9\n", "AdamW: theta = 0.99\n", "is 1.00 lr",
                  "is 1.99 lr", "is 7.09 lr", "float32: 16 bytes", "bfloat16: 16 bytes",
                  "without a master copy 0.1001, with it 0.05"):  # fmt: skip
        assert claim in printed
