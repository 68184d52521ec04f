# SPDX-License-Identifier: MIT
"""nanopeft/adalora.py against peft's AdaLoRA, step by step, and numbers worked out apart."""

import copy
import json

import peft
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import IDS, hf_gpt2, hf_llama

from nanopeft import adalora, adamw, lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out is set to False")


LOSSES = [14.971762, 14.879856, 14.744461, 14.477285, 14.041748, 12.711060, 9.749476, 4.881246, 2.796794, 2.759011]
FIRST = {  # Λ of both layers after steps 1 to 7
    1: [-0.014633, -0.004352, 0.020240, 0.019015, -0.028446, 0.001496],
    2: [-0.030444, -0.009093, 0.042232, 0.038115, -0.056504, 0.002702],
    3: [-0.047515, 0, 0.066134, 0.061714, -0.094547, 0],
    4: [0, 0, 0, 0.093847, -0.152252, 0],
    5: [0, 0, 0, 0.140970, -0.242865, 0],
    7: [0, 0, 0, 0.294167, -0.569037, 0],
    10: [0, 0, 0, 0.380347, -0.730818, 0],
}


def test_a_trace_of_ten_steps():
    """Two small layers under SGD: each loss, and Λ after the steps that prune, are those of the official code."""
    a, b = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
    a.weight.data, b.weight.data = torch.linspace(-1, 1, 12).view(4, 3), torch.linspace(1, -1, 8).view(2, 4)
    model = adalora.add_adalora(nn.Sequential(a, nn.Tanh(), b), r=3, alpha=6)
    layers = [*lora.lora_layers(model).values()]
    for layer in layers:
        for p, wave in ((layer.lora_A, torch.sin), (layer.lora_B, torch.cos)):
            p.data = 0.5 * wave(torch.arange(1.0, p.numel() + 1)).view(p.shape)
    x, target = torch.linspace(-1, 1, 15).view(5, 3), torch.linspace(0, 1, 10).view(5, 2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    adalora.RankBudget(model, optimizer, total=10, target_r=1, start=2, end=3)
    for t, expected in enumerate(LOSSES, 1):
        loss = (model(x) - target).square().sum()
        assert loss.item() == pytest.approx(expected, abs=2e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if t in FIRST:
            found = torch.cat([layer.lora_E[:, 0] for layer in layers])
            torch.testing.assert_close(found, torch.tensor(FIRST[t], dtype=torch.float32), rtol=0, atol=3e-6)
    assert (model(x) - target).square().sum().item() == pytest.approx(2.726085, abs=2e-5)
    assert adalora.ranks(model) == {"0": 0, "2": 2}


def test_the_budget():
    """b(t) for 24 to 16 triplets over 20 steps, two of warm-up and four at the end."""
    found = [adalora.budget(t, 20, 2, 4, 24, 16) for t in range(21)]
    assert found == [24, 24, 24, 22, 21, 19, 18, 18, 17, 17, *[16] * 11]


@pytest.mark.parametrize("make", [hf_gpt2, hf_llama])
def test_fifty_steps_beside_peft(make, tmp_path):
    """Over 50 steps losses, Λ and the triplets that are kept are peft's; the file of each opens on the other side.

    Losses within 1e-5: 50 steps of Adam enlarge fp32's rounding some tens of times.
    """
    torch.manual_seed(0)
    base, total, start, end = make(), 50, 5, 15
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=3, lora_alpha=12, target_modules="all-linear", total_step=total,
        tinit=start, tfinal=end, deltaT=2, orth_reg_weight=0.1,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = adalora.add_adalora(copy.deepcopy(base), r=6, alpha=12)
    names = {key.replace(".default", ""): p for key, p in theirs.named_parameters() if p.requires_grad}
    for key, p in lora.lora_parameters(ours).items():
        p.data.copy_(names[key])
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=3e-3) for m in (ours, theirs)]
    adalora.RankBudget(ours, optimizers[0], total, 3, start=start, end=end, every=2)
    for t in range(1, total + 1):
        loss = ours(IDS, labels=IDS).loss + adalora.orthogonality(ours, 0.1)
        loss.backward()
        their_loss = theirs(input_ids=IDS, labels=IDS).loss
        their_loss.backward()
        assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5), t
        for optimizer in optimizers:
            optimizer.step()
        theirs.base_model.update_and_allocate(t)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name, layer in lora.lora_layers(ours).items():
            E = names[f"base_model.model.{name}.lora_E"]
            assert torch.equal(layer.lora_E == 0, E == 0), (t, name)
            torch.testing.assert_close(layer.lora_E, E, rtol=1e-3, atol=1e-5)
    ranks = [*adalora.ranks(ours).values()]
    assert len({*ranks}) > 1 and sum(ranks) == 3 * len(ranks)

    def near(a, b):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()

    theirs.save_pretrained(tmp_path / "theirs")
    again = adalora.add_adalora(copy.deepcopy(base), r=6, alpha=12)
    adalora.load_adalora_state_dict(again, load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    near(again(IDS).logits, theirs(IDS).logits)
    (tmp_path / "ours").mkdir()
    save_file(adalora.adalora_state_dict(ours), tmp_path / "ours" / "adapter_model.safetensors")
    saved = adalora.adalora_config(ours) | {"task_type": "CAUSAL_LM"}
    (tmp_path / "ours" / "adapter_config.json").write_text(json.dumps(saved))
    near(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")(IDS).logits, ours(IDS).logits)
    before = ours(IDS).logits
    near(lora.merge_lora(ours)(IDS).logits, before)


@pytest.mark.parametrize("make", [hf_gpt2, hf_llama])
def test_logits_gradients_and_merge_are_pefts(make):
    """With the same numbers logits, gradients of loss and penalty, and merged logits are peft's.

    In fp64, within 1e-12. In fp32 the order of sums alone makes 2e-6 in a gradient, and more with larger numbers.
    """
    torch.manual_seed(0)
    base = make()
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=3, lora_alpha=12, target_modules="all-linear", total_step=50,
        tinit=5, tfinal=15, orth_reg_weight=0.1,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).double()
    ours = adalora.add_adalora(base, r=6, alpha=12).double()
    names = {key.replace(".default", ""): p for key, p in theirs.named_parameters() if p.requires_grad}
    for key, p in lora.lora_parameters(ours).items():
        nn.init.normal_(p, std=0.1)
        names[key].data.copy_(p)
    found, expected = ours(IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    (found.loss + adalora.orthogonality(ours, 0.1)).backward()
    expected.loss.backward()
    pairs = [(p.grad, names[key].grad) for key, p in lora.lora_parameters(ours).items()]
    pairs += [(found.logits, expected.logits)]
    pairs += [(lora.merge_lora(ours)(IDS).logits, theirs.merge_and_unload()(IDS).logits)]
    for a, b in pairs:
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@settings(deadline=None, max_examples=30)
@given(
    n_in=st.integers(1, 9), n_out=st.integers(1, 9), r=st.integers(1, 6), alpha=st.floats(0.1, 30),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_merged_and_unmerged_compute_the_same(n_in, n_out, r, alpha, seed):
    """Merged and unmerged are x (W + s P Λ Q)ᵀ + b in fp64, also with some λ at 0; unmerged, W has its bits."""
    torch.manual_seed(seed)
    layer, x = nn.Linear(n_in, n_out).double(), torch.randn(4, n_in, dtype=torch.float64)
    W = layer.weight.detach().clone()
    model = adalora.add_adalora(nn.Sequential(layer), r=r, alpha=alpha)
    assert torch.equal(model(x), layer(x))  # Λ = 0
    one = model[0]
    one.lora_E.data = torch.randn(r, 1, dtype=torch.float64) * (torch.rand(r, 1) > 0.3)
    expected = x @ (W + alpha / (r + 1e-5) * one.lora_B @ one.lora_E.flatten().diag() @ one.lora_A).t() + layer.bias
    close = dict(rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model(x), expected, **close)
    state = {key: t.clone() for key, t in adalora.adalora_state_dict(model).items()}
    assert {len(t.squeeze(1)) for key, t in state.items() if key.endswith("E")} == {adalora.ranks(model)["0"]}
    torch.testing.assert_close(lora.merge_lora(model)(x), expected, **close)
    assert torch.equal(lora.remove_lora(lora.unmerge_lora(model))[0].weight, W)
    again = adalora.add_adalora(model, r=r, alpha=alpha)
    adalora.load_adalora_state_dict(again, state)
    torch.testing.assert_close(again(x), expected, **close)


def test_pruning_goes_on_from_the_optimizers_state():
    """What a RankBudget remembers is in the optimizer's state: a copy that takes this over ends with the same bits."""

    def make():
        torch.manual_seed(0)
        model = adalora.add_adalora(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), r=4)
        optimizer = adamw.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        adalora.RankBudget(model, optimizer, total=30, target_r=2)
        return model, optimizer

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            x = torch.randn(16, 8)
            (model(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    for cut in (2, 12, 25):  # in the warm-up, while it prunes, and at the end
        (whole, optimizer), (parts, other) = make(), make()
        train(whole, optimizer, range(30))
        train(parts, other, range(cut))
        again, third = make()
        for p, q in zip(again.parameters(), parts.parameters()):
            p.data.copy_(q)
            if q in other.state:
                third.state[p].update({k: v.clone() if torch.is_tensor(v) else v for k, v in other.state[q].items()})
        train(again, third, range(cut, 30))
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters())), cut
        assert sum(adalora.ranks(whole).values()) == 4


def test_going_on_with_our_adamw():
    """Its state carries the importance that RankBudget keeps there, so ten steps and ten more are twenty."""
    found = []
    for parts in ((20,), (10, 10)):
        torch.manual_seed(0)
        model, saved = adalora.add_adalora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), r=3), None
        for n in parts:
            optimizer = adamw.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
            adalora.RankBudget(model, optimizer, total=20, target_r=1)
            optimizer.load_state_dict(saved) if saved else None
            for _ in range(n):
                model(torch.ones(2, 4)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            saved = optimizer.state_dict()
        found.append(adalora.adalora_state_dict(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_layer_that_takes_no_part_is_named():
    """Without a gradient nothing can be scored: an Error with the layer's name."""
    model = adalora.add_adalora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), r=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    adalora.RankBudget(model, optimizer, total=20, target_r=1)
    model[0](torch.ones(2, 4)).sum().backward()
    with pytest.raises(adalora.Error, match="^1 took no part in the loss"):
        optimizer.step()


def test_what_cannot_be():
    """An embedding, no AdaLoRA and no steps to prune in are Errors of one line; add_lora's own options are unknown."""
    model = hf_llama()
    with pytest.raises(adalora.Error, match="is an embedding"):
        adalora.add_adalora(model, ["embed_tokens"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    with pytest.raises(adalora.Error, match="no AdaLoRA"):
        adalora.RankBudget(model, optimizer, 10)
    adalora.add_adalora(model, r=4)
    wrong = {"pruning needs steps": dict(total=30, start=20, end=10), "target_r must be": dict(total=30, target_r=5)}
    for says, arguments in wrong.items():
        with pytest.raises(adalora.Error, match=says):
            adalora.RankBudget(model, optimizer, **arguments)
    for unknown in ("rslora", "init", "ranks"):  # add_lora has these, and AdaLoRA would not follow them
        with pytest.raises(TypeError, match=unknown):
            adalora.add_adalora(hf_llama(), **{unknown: None})


def test_a_file_that_does_not_fit_is_refused():
    """A file with more triplets, fewer of one factor, a narrower layer, or without a key: an Error, nothing loaded."""

    def file(width=8, r=4):
        model = adalora.add_adalora(nn.Sequential(nn.Linear(width, width)), r=r)
        model[0].lora_E.data.fill_(1)
        return model, adalora.adalora_state_dict(model)

    model, good = file()
    before = {key: t.clone() for key, t in good.items()}
    A, B, E = (f"base_model.model.0.lora_{part}" for part in "ABE")
    uneven = [good | {A: good[A][:2]}, good | {B: good[B][:, :2]}, good | {E: good[E][:2]}]
    for state in (file(r=5)[1], file(width=4)[1], *uneven, {A: good[A], B: good[B]}, good | {"more": good[E]}):
        with pytest.raises(lora.Error):
            adalora.load_adalora_state_dict(model, state)
        assert all(torch.equal(t, before[key]) for key, t in adalora.adalora_state_dict(model).items())


@pytest.mark.parametrize("total, end", [(1, 0), (2, 0), (10, 9), (10, 8)])
def test_the_last_pruning_may_be_at_the_first_step(total, end):
    """However few the steps, the budget is met at the end."""
    torch.manual_seed(0)
    model = adalora.add_adalora(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), r=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    adalora.RankBudget(model, optimizer, total, 2, start=0, end=end)
    for _ in range(total):
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(adalora.ranks(model).values()) == 4
