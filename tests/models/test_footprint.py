import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from benchmarks.rates import choose_cases
from models import footprint
from models.footprint import Tracker, gathered_bytes, measure, sharded_bytes, state_bytes
from models.published_sizes import TINY as SIZES
from models.training import TrainingRun
from models.training_workloads import StepSettings, story_step

TINY = {case.workload.name: case.workload for case in choose_cases(tiny=True)}


class Trained(nn.Module):
    """A linear layer whose optimizer has its state."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 32, bias=False)
        self.training_run = TrainingRun(dict(self.named_parameters()), seed=0)
        self.layer.weight.grad = torch.zeros_like(self.layer.weight)
        self.training_run.take_step(0.0)


def test_a_training_step_of_a_linear_layer_by_hand():
    def step(model):
        inputs = torch.randn(8, 64)
        loss = model.layer(inputs).sum()
        model.training_run.add_gradients(loss)
        model.training_run.optimizer.step()
        return loss

    found = measure(Trained, step)
    weight = 4 * 64 * 32
    assert (found.parameters, found.parameter_bytes) == (64 * 32, weight)
    moments_and_step = 2 * weight + 4
    norm = 4  # of the first step's gradients, which the run keeps
    assert found.resident_bytes == weight + moments_and_step + norm
    # Most is there when the gradient is: with the inputs that the step still holds, the loss, and the loss's gradient.
    assert found.peak_bytes == found.resident_bytes + weight + 4 * 8 * 64 + 4 + 4
    assert found.flops == 2 * (2 * 8 * 64 * 32)  # forward, and the weight's gradient; the inputs ask for none
    assert found.outputs == ("float32[]",)


def test_attention_is_counted_forward_and_backward():
    """Two products of all pairs of positions forward; backward one more to compute the weights anew, and four."""

    def run(model):
        rows = torch.randn(1, 2, 16, 8, requires_grad=True)
        nn.functional.scaled_dot_product_attention(rows, rows, rows).sum().backward()

    product = 2 * (2 * 16 * 16 * 8)
    assert measure(lambda: nn.Linear(1, 1), run).flops == (2 + 5) * product


@given(st.lists(st.one_of(st.integers(1, 1000), st.integers(-5, -1)), max_size=30))
def test_a_trackers_peak_is_the_sum_counted_by_hand(moves):
    """A positive number makes a tensor of as many numbers, a negative one lets go of one of those that are there."""
    with Tracker() as tracker:
        held, live, peak = [], 0, 0
        for move in moves:
            if move > 0:
                held.append(torch.zeros(move))
                held[-1].add_(1)  # gives no new memory
                assert held[-1].view(-1, 1).shape == (move, 1)  # nor does this
                live += 4 * move
            elif held:
                live -= 4 * len(held.pop(move % len(held)))
            peak = max(peak, live)
            assert tracker.live_bytes == live
        assert tracker.peak_bytes == peak
        tracker.reset_peak()
        assert tracker.peak_bytes == live
        held.clear()
        assert tracker.live_bytes == 0


@pytest.mark.parametrize("name", TINY)
def test_fake_and_real_runs_agree(name):
    """On the same kernels, a run on tensors that hold something takes as much memory and does the same arithmetic."""
    workload = TINY[name]
    expected = workload.footprint()
    torch.manual_seed(0)
    gc.collect()
    with Tracker() as tracker:
        model = workload.build("cpu")
        resident, before = tracker.live_bytes, tracker.flops
        tracker.reset_peak()
        workload.run(model)
        flops = tracker.flops - before
    assert flops == expected.flops > 0
    assert resident == expected.resident_bytes
    assert tracker.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.02)
    assert expected.working_bytes > 0


def test_values_that_follow_from_the_program_are_known():
    def run(model):
        kinds = torch.tensor([[3, 6, 6, 0], [6, 3, 3, 6]])
        chosen = torch.randn(2, 4, 5)[kinds == 6]
        places = (kinds == 6).nonzero()
        counts = torch.arange(3).repeat_interleave(torch.tensor([2, 0, 4]))
        kinds[:, 0] = 6
        return chosen, places, counts, torch.zeros((kinds == 6).sum().item())

    shapes = ("float32[4, 5]", "int64[4, 2]", "int64[6]", "float32[5]")
    assert measure(lambda: nn.Linear(1, 1), run).outputs == shapes


def test_values_that_follow_from_random_numbers_are_not():
    def run(model):
        return torch.zeros(4)[torch.randn(4) > 0]

    with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
        measure(lambda: nn.Linear(1, 1), run)


def test_values_that_were_overwritten_with_unknown_ones_are_forgotten():
    def run(model):
        known = torch.zeros(4)
        part = known[1:]
        known.copy_(torch.randn(4))
        return part.sum().item()

    with pytest.raises(DataDependentOutputException):
        measure(lambda: nn.Linear(1, 1), run)


def test_changed_types_are_seen_and_ties_are_counted_once():
    def build():
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        model.float()  # changes nothing, so that the tie stays
        return nn.Sequential(model, nn.Linear(4, 2, bias=False).to(torch.bfloat16))

    found = measure(build, lambda model: model[0](torch.ones(1, 4)))
    assert (found.parameters, found.parameter_bytes) == (16 + 8, 4 * 16 + 2 * 8)


def test_memory_of_training_by_hand():
    assert state_bytes(1000) == 16_000  # weight, gradient, two moments
    assert state_bytes(1000, frozen=500, average=True) == 22_000
    # Two layers of 100 in half precision, one's gradients in float32; 50 beside them, with gradients, in float32.
    assert gathered_bytes(100, 50, "bfloat16") == 2 * 200 + 400 + 400
    assert gathered_bytes(100, 50, "float32") == 2 * 400 + 400 + 400
    assert sharded_bytes(16_001, 1200, 300, processes=4) == 4001 + 1500


def test_a_model_of_several_processes_holds_what_the_formulas_say():
    """The states of a training workload are those of the run that has an optimizer, plus its gradients."""
    whole = TINY["llama2_7b training 3 frames"].footprint()
    plain = story_step(StepSettings(), 3, SIZES).footprint()
    assert plain.state_bytes == whole.state_bytes
    held = plain.resident_bytes + plain.parameter_bytes  # all but the table of words has a gradient
    table = 4 * SIZES["llama2_7b"]["trunk"]["vocab_size"] * SIZES["llama2_7b"]["trunk"]["hidden_size"]
    assert plain.state_bytes == pytest.approx(held - table, rel=0.25)  # buffers of tokens' statistics are no parameters
    assert whole.parameter_bytes < plain.parameter_bytes


def test_parameters_alone_have_no_working_memory():
    assert footprint.Footprint(10, 40, 40, None, None).working_bytes == 0
