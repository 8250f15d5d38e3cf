import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_training import numbers, pretrain_plan

from bit_ray.data.images.views import TrainView
from bit_ray.data.stream.order import Order
from bit_ray.errors import ConfigError
from bit_ray.models.zoo import create_model
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.device import normalize, resolve_precision
from bit_ray.training.healing import NonFiniteError
from bit_ray.training.learner import Learner, build_model
from bit_ray.training.objectives.classify import loss_sum, mixed_targets, mixup_weight, swap_neighbours
from bit_ray.training.optimizer import build_optimizer
from bit_ray.training.plan import TrainPlan
from bit_ray.training.step import TrainStep, dropout_mask, micro_batches

NAME = "R1-1-1-1x0.5"
CPU = torch.device("cpu")
NUM_CLASSES, BATCH = 7, 32


def make_plan(**changes):
    settings = {
        "kind": "pretrain",
        "model": NAME,
        "num_classes": NUM_CLASSES,
        "manifest_digest": "0" * 64,
        "num_examples": 640,
        "view": TrainView(crop="inception", crop_size=32),
        "resize_mode": "square",
        "resize_size": 32,
        "loss": "softmax",
        "schedule": Schedule(base_lr=0.1, num_steps=10),
        "global_batch_size": BATCH,
        "weight_decay": 0.01,
    }
    return TrainPlan(**settings | changes)


def make_model(seed=0):
    torch.manual_seed(seed)
    model = create_model(NAME, NUM_CLASSES)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model.to(memory_format=torch.channels_last)


class InDouble(torch.nn.Module):
    """The network in float64, where a ReLU on the edge does not turn rounding into a difference."""

    def __init__(self, seed=0):
        super().__init__()
        self.network = make_model(seed).double()

    def forward(self, x):
        return self.network(x.double())


def make_batch(size=BATCH, seed=0, multi_label=False):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8, generator=generator)
    if multi_label:
        return images, torch.randint(0, 2, (size, NUM_CLASSES), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, NUM_CLASSES, (size,), generator=generator)


def run_steps(model, plan, batches, micro=BATCH):
    """Losses and gradient norms of the steps, and the optimizer."""
    optimizer = build_optimizer(model, plan)
    step_fn = TrainStep(model, optimizer, plan)
    results = []
    for step, (images, targets) in enumerate(batches):
        results.append(step_fn(step, micro_batches(images, targets, micro), -(-len(images) // micro)))
    step_fn.check()
    return [(loss.item(), norm.item()) for loss, norm in results], optimizer


def pixels(images):
    return torch.from_numpy((images.numpy().astype(np.float64) - 127.5) / 127.5).float().permute(0, 3, 1, 2)


def assert_same_weights(a, b, rtol=1e-5, atol=1e-6):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_pixels_are_normalized_to_minus_one_to_one_in_channels_last():
    images, _ = make_batch(8)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 255
    x = normalize(images, CPU)
    assert x.dtype == torch.float32
    assert x.shape == (8, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x, pixels(images), rtol=1e-6, atol=1e-7)
    assert (x[0, 0, 0, 0], x[0, 1, 0, 0]) == (-1.0, 1.0)


def test_the_softmax_loss_is_the_summed_log_likelihood():
    logits, labels = torch.randn(9, NUM_CLASSES), torch.arange(9) % NUM_CLASSES
    expected = -sum((row.exp() / row.exp().sum())[label].log() for row, label in zip(logits, labels, strict=True))
    torch.testing.assert_close(loss_sum(logits, labels, "softmax"), expected)


def test_the_sigmoid_loss_is_summed_over_classes_and_examples():
    logits, targets = torch.randn(9, NUM_CLASSES), (torch.rand(9, NUM_CLASSES) < 0.3).to(torch.uint8)
    p = logits.sigmoid()
    expected = -torch.where(targets == 1, p.log(), (1 - p).log()).sum()
    torch.testing.assert_close(loss_sum(logits, targets, "sigmoid"), expected)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_three_steps_equal_plain_pytorch(loss):
    plan = make_plan(loss=loss, schedule=Schedule(base_lr=0.1, num_steps=4, warmup_steps=2))
    batches = [make_batch(seed=i, multi_label=loss == "sigmoid") for i in range(3)]
    model = InDouble()
    reference = copy.deepcopy(model)
    results, optimizer = run_steps(model, plan, batches)

    kernels = {
        f"{name}.weight"
        for name, module in reference.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    }
    momentum = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for step, (images, targets) in enumerate(batches):
        logits = reference(pixels(images))
        if loss == "softmax":
            mean = F.cross_entropy(logits, targets)
        else:
            mean = F.binary_cross_entropy_with_logits(logits, targets.double(), reduction="none").sum(1).mean()
        gradients = torch.autograd.grad(mean, list(reference.parameters()))
        norm = sum(g.pow(2).sum() for g in gradients).sqrt()
        assert results[step] == pytest.approx((mean.item(), norm.item()), rel=1e-6)
        lr = [0.0, 0.05, 0.1][step]
        with torch.no_grad():
            for (name, p), g in zip(reference.named_parameters(), gradients, strict=True):
                momentum[name] = 0.9 * momentum[name] + g + (0.01 * p if name in kernels else 0)
                p -= lr * momentum[name]
    assert_same_weights(model, reference, rtol=1e-5, atol=1e-7)
    for name, p in model.named_parameters():
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], momentum[name], rtol=1e-5, atol=1e-6)


def test_weight_decay_moves_kernels_only():
    plan = make_plan(weight_decay=0.1, schedule=Schedule(base_lr=0.5, num_steps=1))
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, plan)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.lr = 0.5
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if p.ndim > 1 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_step_is_the_same_however_the_batch_is_cut(alpha):
    plan = make_plan(mixup_alpha=alpha, schedule=Schedule(base_lr=0.5, num_steps=3))
    whole, cut = InDouble(), InDouble()
    batches = [make_batch(seed=i) for i in range(2)]
    a, _ = run_steps(whole, plan, batches)
    b, _ = run_steps(cut, plan, batches, micro=8)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert_same_weights(whole, cut, rtol=1e-8, atol=1e-10)


def test_mixup_is_the_mixed_one_hot_cross_entropy():
    images, labels = make_batch(16)
    plan = make_plan(mixup_alpha=0.4, seed=5, global_batch_size=16)
    model = make_model()
    lam = mixup_weight(0.4, 5, 0)
    assert 0.01 < lam < 0.99
    x, y = pixels(images), F.one_hot(labels, NUM_CLASSES).float()
    partner = torch.arange(16) ^ 1
    mixed_x, mixed_y = lam * x + (1 - lam) * x[partner], lam * y + (1 - lam) * y[partner]
    expected = -(mixed_y * model(mixed_x).log_softmax(1)).sum(1).mean().item()
    [(loss, _)], _ = run_steps(model, plan, [(images, labels)], micro=16)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_both_weighted_losses_are_the_mixed_one_hot_cross_entropy_and_so_are_their_gradients(lam):
    labels = make_batch(24)[1]
    logits = torch.randn(24, NUM_CLASSES, dtype=torch.float64, requires_grad=True)
    ours = lam * loss_sum(logits, labels, "softmax") + (1 - lam) * loss_sum(logits, mixed_targets(labels), "softmax")
    one_hot = F.one_hot(labels, NUM_CLASSES).double()
    mixed = lam * one_hot + (1 - lam) * one_hot[torch.arange(24) ^ 1]
    expected = -(mixed * logits.log_softmax(1)).sum()
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    [gradient], [reference] = (torch.autograd.grad(loss, logits, retain_graph=True) for loss in (ours, expected))
    torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-15)


def test_every_other_example_is_as_likely_a_partner():
    num, epochs = 12, 600
    order = Order(shard_sizes=(num,), row_group_size=1, global_batch_size=num, seed=3)
    slots = range(num)
    met = np.zeros((num, num), int)
    for unit in order.unit_range(slots, 0, epochs):
        batch = torch.from_numpy(order.unit(unit, slots).rows)
        partners = swap_neighbours(batch)
        assert sorted(partners.tolist()) == list(range(num))
        np.add.at(met, (batch.numpy(), partners.numpy()), 1)
    assert met.sum() == num * epochs
    assert not met.diagonal().any()
    expected = epochs / (num - 1)
    pairs = met[np.triu_indices(num, 1)]
    chi_square, freedom = ((pairs - expected) ** 2 / expected).sum(), len(pairs) - num
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_mixed_images_stay_channels_last():
    model, seen = make_model(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run_steps(model, make_plan(mixup_alpha=0.4), [make_batch()], micro=BATCH // 2)
    assert len(seen) == 2
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_lambda_is_beta_distributed_and_a_function_of_seed_and_step(alpha):
    draws = np.array([mixup_weight(alpha, 3, step) for step in range(4000)])
    assert mixup_weight(alpha, 3, 17) == draws[17]
    assert mixup_weight(alpha, 4, 17) != draws[17]
    variance = 1 / (4 * (2 * alpha + 1))
    assert draws.mean() == pytest.approx(0.5, abs=4 * (variance / 4000) ** 0.5)
    assert draws.var() == pytest.approx(variance, rel=0.06)


def test_the_schedule_is_followed_to_the_last_step():
    plan = make_plan(schedule=Schedule(base_lr=1.0, num_steps=4, warmup_steps=2, boundaries=(3,)), global_batch_size=2)
    model = make_model()
    optimizer = build_optimizer(model, plan)
    step_fn = TrainStep(model, optimizer, plan)
    rates = []
    for step in range(4):
        step_fn(step, [make_batch(2)], 1)
        rates.append(optimizer.lr)
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.1])


def test_clipping_scales_the_whole_gradient_to_the_limit():
    batch = make_batch()
    free = make_model()
    [(_, norm)], _ = run_steps(free, make_plan(weight_decay=0.0), [batch])
    clipped = make_model()
    start = copy.deepcopy(clipped.state_dict())
    [(_, reported)], _ = run_steps(clipped, make_plan(weight_decay=0.0, clip_norm=norm / 4), [batch])
    assert reported == pytest.approx(norm)
    for name, p in free.state_dict().items():
        step, scaled = p - start[name], clipped.state_dict()[name] - start[name]
        torch.testing.assert_close(scaled, step / 4, rtol=1e-3, atol=1e-7)
    above = make_model()
    run_steps(above, make_plan(weight_decay=0.0, clip_norm=norm * 2), [batch])
    assert_same_weights(above, free, rtol=0, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_non_finite_gradient_stops_with_the_step_and_the_weights_before_it(bad_step, poison):
    plan = make_plan(global_batch_size=8)
    batches = [make_batch(8, seed=i) for i in range(4)]
    model, reference = make_model(), make_model()
    _, reference_optimizer = run_steps(reference, plan, batches[:bad_step], micro=8)
    optimizer = build_optimizer(model, plan)
    step_fn = TrainStep(model, optimizer, plan)
    for step in range(bad_step):
        step_fn(step, [batches[step]], 1)
    hook = model.head.weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(3), poison))
    step_fn(bad_step, [batches[bad_step]], 1)
    hook.remove()
    with pytest.raises(NonFiniteError, match=f"^step {bad_step}: ") as caught:
        step_fn(bad_step + 1, [batches[bad_step + 1]], 1)
    assert caught.value.step == bad_step
    assert "\n" not in str(caught.value)
    assert_same_weights(model, reference, rtol=0, atol=0)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], reference_optimizer.state[q]["momentum_buffer"])


def test_the_last_step_is_checked_when_asked():
    plan = make_plan(global_batch_size=8)
    model = make_model()
    step_fn = TrainStep(model, build_optimizer(model, plan), plan)
    images, labels = make_batch(8)
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    step_fn(0, [(images, labels)], 1)
    with pytest.raises(NonFiniteError, match="step 0"):
        step_fn.check()
    step_fn.check()


def capabilities(monkeypatch, **flags):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)


def test_auto_precision_on_a_cpu_is_bfloat16_only_where_that_pays(monkeypatch):
    for flags in ({"amx_bf16": True, "avx512_bf16": True}, {"avx512_bf16": True}, {}):
        capabilities(monkeypatch, **flags)
        for num_features, crop_size in ((2048, 224), (2048, 64), (2048, 63), (1024, 224), (0, 0)):
            pays = "amx_bf16" in flags and (num_features, crop_size) in ((2048, 224), (2048, 64))
            network = {"num_features": num_features, "crop_size": crop_size}
            assert resolve_precision("auto", CPU, **network) is (torch.bfloat16 if pays else torch.float32)
            assert resolve_precision("fp32", CPU, **network) is torch.float32


def test_bfloat16_is_refused_on_a_cpu_without_a_fast_path(monkeypatch):
    capabilities(monkeypatch, avx2=True, amx_bf16=False, avx512_bf16=False)
    with pytest.raises(ConfigError, match="^runtime.precision: bf16, but .* cpu .*; accepted: .*; use auto or fp32$"):
        resolve_precision("bf16", CPU)


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16"])
def test_bfloat16_is_allowed_on_a_cpu_with_a_fast_path(monkeypatch, flag):
    capabilities(monkeypatch, **{flag: True})
    assert resolve_precision("bf16", CPU) is torch.bfloat16


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_precision_on_a_gpu_follows_its_compute_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda")) is dtype


def test_a_bfloat16_step_learns_about_the_same_with_float32_weights():
    plan = make_plan()
    batch = make_batch()
    full, half = make_model(), make_model()
    [(loss, norm)], _ = run_steps(full, plan, [batch])
    optimizer = build_optimizer(half, plan)
    step_fn = TrainStep(half, optimizer, plan, dtype=torch.bfloat16)
    kinds = []
    half.head.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    half_loss, half_norm = step_fn(0, [batch], 1)
    assert kinds == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert half_loss.item() == pytest.approx(loss, rel=0.02)
    assert half_loss.item() != loss
    assert half_norm.item() == pytest.approx(norm, rel=0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_hole_has_no_part_in_the_step_and_nobody_elses_part_changes(loss, alpha):
    schedule = Schedule(base_lr=0.1, num_steps=2, warmup_steps=0)
    plan = make_plan(loss=loss, mixup_alpha=alpha, weight_decay=0.0, schedule=schedule)
    images, targets = make_batch(multi_label=loss == "sigmoid")
    targets = targets.to(torch.int8) if loss == "sigmoid" else targets
    holes = [5, 16, 17, 30]
    for slot in holes:  # as the stream makes them: the neighbour's pixels, or none
        images[slot] = images[slot ^ 1] if slot ^ 1 not in holes else 0
        targets[slot] = -1
    model = InDouble()
    reference = copy.deepcopy(model)
    results, _ = run_steps(model, plan, [(images, targets)], micro=8)

    lam = mixup_weight(alpha, plan.seed, 0) if alpha else 1.0
    total = torch.zeros((), dtype=torch.float64)
    x = pixels(images).double()
    for slot in (i for i in range(BATCH) if i not in holes):
        partner = slot if slot ^ 1 in holes else slot ^ 1
        logits = reference(lam * x[slot : slot + 1] + (1 - lam) * x[partner : partner + 1])
        for weight, of in ((lam, slot), (1 - lam, partner)):
            if loss == "softmax":
                total += weight * F.cross_entropy(logits, targets[of : of + 1], reduction="sum")
            else:
                total += weight * F.binary_cross_entropy_with_logits(
                    logits, targets[of : of + 1].double(), reduction="sum"
                )
    (total / BATCH).backward()
    assert results[0][0] == pytest.approx(total.item() / BATCH, rel=1e-5)
    with torch.no_grad():
        for p in reference.parameters():
            p -= plan.schedule.lr_at(0) * p.grad
    assert_same_weights(model, reference, rtol=1e-4, atol=1e-6)


def test_decay_to_the_initial_weights_is_l2_sp():
    plan = pretrain_plan(decay_to_init=True, weight_decay=0.1, momentum=0.0)
    start = build_model(plan, None)
    learner = Learner(plan, CPU)
    reference = build_model(plan, None).double()
    initial = {name: p.detach().double().clone() for name, p in start.named_parameters()}
    for step in range(3):
        images = torch.from_numpy(numbers(8, 32, 32, 3, seed=step).astype(np.uint8))
        targets = torch.from_numpy(numbers(8, high=6, seed=100 + step))
        learner.step(step, images, targets)
        x = images.permute(0, 3, 1, 2).double() / 127.5 - 1
        reference.zero_grad()
        loss = torch.nn.functional.cross_entropy(reference(x), targets)
        for name, p in reference.named_parameters():  # Li et al., arXiv 1802.01483, on kernels alone
            if p.ndim > 1:
                loss = loss + 0.05 * (p - initial[name]).square().sum()
        loss.backward()
        with torch.no_grad():
            for p in reference.parameters():
                p -= plan.schedule.lr_at(step) * p.grad
    for (name, ours), theirs in zip(learner.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_dropouts_masks_are_a_function_of_the_slot():
    whole = dropout_mask(0.25, 7, 3, range(64), 512)
    assert whole.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert whole.count_nonzero() / whole.numel() == pytest.approx(0.75, abs=5 * (0.25 * 0.75 / whole.numel()) ** 0.5)
    assert torch.equal(dropout_mask(0.25, 7, 3, range(20, 31), 512), whole[20:31])
    others = (dropout_mask(0.25, 8, 3, range(64), 512), dropout_mask(0.25, 7, 4, range(64), 512))
    assert not any(torch.equal(other, whole) for other in others)
    assert len({tuple(row) for row in whole.tolist()}) == 64
