"""The brute-force oracle against arithmetic done by hand, and against PyTorch's own Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import conv
from attackroute.core.errors import UserError
from attackroute.tracing.oracle import OracleTrace, influence, trace
from tracing import state, untidy

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """Named layers and a function of (net, x)."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._call = run

    def forward(self, x: Tensor) -> Any:
        return self._call(self, x)


def total(z: Tensor) -> Tensor:
    """A head without weights: the logits are the channels' sums."""
    return z.sum(dim=(2, 3))


def same(actual: Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype))


def chosen(found: OracleTrace, name: str, sample: int = 0) -> list[int]:
    return found.masks[name][sample].nonzero().flatten().tolist()


# Eqs. (1)-(2) by hand


def test_influence_counts_live_positions_times_the_absolute_weight() -> None:
    # x = [1, 2]. Z_a: channel 0 = x = [1, 2]; channel 1 = 1.5 - x = [0.5, -0.5]. ReLU passes 2 positions, and 1.
    net = Net(lambda m, x: total(m.b(F.relu(m.a(x)))), a=conv([[1], [-1]], [0, 1.5]), b=conv([[2, -3], [1, 4]]))
    found = trace(net, torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([0]), width=0.5)
    same(found.influence["a", "b"], [[[2 * 2, 1 * 3], [2 * 1, 1 * 4]]])


def test_influence_of_a_position_that_interacts_with_others() -> None:
    # b reads s_p * (s_0 + s_1) with s = [2, 3]: d z_0 = [2 * 2 + 3, 2] = [7, 2], d z_1 = [3, 2 + 2 * 3] = [3, 8].
    net = Net(lambda m, x: (s := m.a(x), m.b(s * s.sum(dim=3, keepdim=True)))[1], a=conv([[1]]), b=conv([[-1]]))
    same(influence(net, torch.tensor([[[[2.0, 3.0]]]]), "a", "b"), [[[7 + 2 + 3 + 8]]])


# Eqs. (3)-(5) by hand


def test_routes_of_a_chain() -> None:
    # One position, no activation, x = 1, weights as influences:
    #   a = [1, 1, 1, 1], b = A a, c = B b. Logits: c. y = 1, so the seed is [+1, -1, 0] with class 0 far above class 2.
    #   b = [3, 1, 0, -1], c = [103, 100, -297]: q = [1, 0, 0] to 1e-170.
    # Width 0.5 keeps round(1.5) = 2 of 3 (half to even), 2 of 4.
    #   c: scores [1, 1, 0] -> 0, 1
    #   b: |B_0| + |B_1| = [34 + 33, 1 + 1, 5 + 7, 0 + 0] -> 0, 2
    #   a: |A_0| + |A_2| = [1 + 0, 2 + 3, 0 + 3, 0 + 0] -> 1, 2
    first = [[1, 2, 0, 0], [1, 0, 0, 0], [0, 3, -3, 0], [-9, 4, 4, 0]]
    second = [[34, 1, 5, 0], [33, 1, -7, 0], [-99, 0, 0, 0]]
    net = nn.Sequential(conv([[1]] * 4), conv(first), conv(second), nn.Flatten())
    found = trace(net, torch.ones(1, 1, 1, 1), torch.tensor([1]), width=0.5)
    assert found.layers == ("0", "1", "2")
    assert found.edges == (("0", "1"), ("1", "2"))
    assert list(found.scores) == list(found.masks) == ["0", "1", "2"]
    same(found.scores["2"], [[1, 1, 0]])
    same(found.scores["1"], [[67, 2, 12, 0]])
    same(found.scores["0"], [[1, 5, 3, 0]])
    assert [chosen(found, name) for name in found.layers] == [[1, 2], [0, 2], [0, 1]]


def test_residual_sum_is_adjacent_on_both_sides() -> None:
    # Z_a = [1, 2]; Z_b = 5 * relu(Z_a), Z_c = W (Z_a + Z_b). a reaches b by 5 * 2, c by the skip alone: 2 |W|.
    def run(m: Any, x: Tensor) -> Tensor:
        z = m.a(x)
        return total(m.c(m.b(F.relu(z)) + z))

    net = Net(run, a=conv([[1]]), b=conv([[5]]), c=conv([[-3], [4]]))
    found = trace(net, torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([0]), width=1.0)
    assert found.edges == (("a", "b"), ("a", "c"), ("b", "c"))
    same(found.influence["a", "b"], [[[10]]])
    same(found.influence["a", "c"], [[[6], [8]]])
    same(found.influence["b", "c"], [[[6], [8]]])
    same(found.scores["b"], [[14]])
    same(found.scores["a"], [[10 + 14]])  # branches add


def test_branches_add_only_their_critical_neurons() -> None:
    # Two 1x1 branches of two channels, side by side in the logits [b_0, b_1, c_0, c_1]; a has two channels.
    # x = 1: a = [1, 1], b = [7, 2], c = [0, 9]. y = 0: q is 1 on c_1 up to e^-7, so the seed is (-1, e^-7, e^-9, 1).
    # b keeps channel 0, c keeps channel 1: a's scores are |B_0| + |C_1| = [3 + 4, 4 + 5].
    def run(m: Any, x: Tensor) -> Tensor:
        z = m.a(x)
        return torch.cat([m.b(z), m.c(z)], dim=1).flatten(1)

    net = Net(run, a=conv([[1], [1]]), b=conv([[3, 4], [100, -98]]), c=conv([[50, -50], [4, 5]]))
    found = trace(net, torch.ones(1, 1, 1, 1), torch.tensor([0]), width=0.5)
    assert found.edges == (("a", "b"), ("a", "c"))
    assert (chosen(found, "b"), chosen(found, "c"), chosen(found, "a")) == ([0], [1], [1])
    same(found.scores["a"], [[7, 9]])


def test_sink_scores_do_not_cancel_between_positions() -> None:
    # Head on (c0p0, c0p1, c1p0, c1p1); logit 1 is zero, so the seed (-1, +1) leaves |gradient| = |row 0|.
    # Channel 0: |1| + |-1| = 2 though its sum is 0; channel 1: 0.75 + 0.75 = 1.5.
    head = nn.Linear(4, 2, bias=False)
    head.weight.data = torch.tensor([[1, -1, 0.75, 0.75], [0, 0, 0, 0]])
    net = Net(lambda m, x: m.head(m.a(x).flatten(1)), a=conv([[1], [1]]), head=head)
    found = trace(net, torch.tensor([[[[0.3, 0.1]]]]), torch.tensor([0]), width=0.5)
    same(found.scores["a"], [[2, 1.5]])
    assert chosen(found, "a") == [0]


# The seed


def test_the_label_counts_on_a_saturated_sample() -> None:
    # Logits [200, 100, 0] in float32: p = [1, 0, 0], softmax - onehot = [0, 3.8e-44, 0]. The seed is (-1, 1, 4e-44).
    head = nn.Linear(2, 3, bias=False)
    head.weight.data = torch.tensor([[150.0, 50], [10, 90], [0, 0]])
    net = Net(lambda m, x: m.head(m.a(x).flatten(1)), a=conv([[1], [1]]), head=head).float()
    x, y = torch.ones(1, 1, 1, 1, dtype=torch.float32), torch.tensor([0])
    assert net(x).softmax(dim=1)[0, 0] == 1
    same(trace(net, x, y).scores["a"], [[140, 40]])
    naive = trace(net, x, y, loss=lambda logits, y: F.cross_entropy(logits, y, reduction="none"))
    assert naive.scores["a"].max() < 1e-40


@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_seed_is_cross_entropy_up_to_one_minus_p(label: int) -> None:
    # Logits ln [2, 3, 5], p = [.2, .3, .5]; e.g. label 0: q = [0, 3/8, 5/8].
    p = torch.tensor([0.2, 0.3, 0.5])
    net = Net(lambda m, x: m.a(x).flatten(1), a=conv([[1]] * 3, p.log().tolist()))
    x, y = torch.zeros(1, 1, 1, 1), torch.tensor([label])
    expected = p / (1 - p[label])
    expected[label] = 1
    same(trace(net, x, y).scores["a"][0], expected)
    plain = trace(net, x, y, loss=lambda logits, y: F.cross_entropy(logits, y, reduction="none"))
    same(plain.scores["a"][0], expected * (1 - p[label]))


def test_without_labels_the_prediction_is_taken() -> None:
    net = Net(lambda m, x: m.a(x).flatten(1), a=conv([[1], [0], [-1]], [0, 0.5, 0]))
    x = torch.tensor([3.0, -3.0, 0.1]).reshape(3, 1, 1, 1)  # predictions 0, 2, 1
    same(trace(net, x).scores["a"], trace(net, x, torch.tensor([0, 2, 1])).scores["a"])
    assert not torch.equal(trace(net, x).scores["a"], trace(net, x, torch.tensor([1, 0, 0])).scores["a"])


def test_a_loss_of_the_caller_is_summed_over_samples() -> None:
    # L = 3 * logit_y: only the label's channel counts, with 3 at each of 2 positions.
    net = Net(lambda m, x: total(m.a(x)), a=conv([[1], [1]]))
    y = torch.tensor([1, 0])
    found = trace(net, torch.rand(2, 1, 1, 2), y, loss=lambda z, y: 3 * z.gather(1, y[:, None])[:, 0])
    same(found.scores["a"], [[0, 6], [6, 0]])


def test_what_the_logits_ignore_is_not_on_the_route() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.unused(m.a(x))
        return total(m.b(x))

    net = Net(run, a=conv([[1]]), unused=conv([[1], [1]]), b=conv([[1], [2]]))
    found = trace(net, torch.rand(1, 1, 2, 2), torch.tensor([0]))
    assert (found.layers, found.edges) == (("b",), ())
    same(found.scores["b"], [[4, 4]])


def test_a_skip_to_the_logits_adds_nothing() -> None:
    # a reaches the logits directly too (weight 100), but it has a successor: only Eq. (5) scores it.
    def run(m: Any, x: Tensor) -> Tensor:
        z = m.a(x)
        return total(m.b(z)) + 100 * total(z)

    found = trace(Net(run, a=conv([[1], [1]]), b=conv([[2, 0], [0, 3]])), torch.rand(1, 1, 1, 1), width=1.0)
    same(found.scores["a"], [[2, 3]])


@pytest.mark.parametrize(
    ("channels", "width", "kept"), [(10, 0.2, 2), (5, 0.5, 2), (7, 0.5, 4), (3, 0.01, 1), (4, 1.0, 4), (1, 0.2, 1)]
)
def test_top_k_keeps_a_rounded_share_and_ties_go_to_the_lower_index(channels: int, width: float, kept: int) -> None:
    # The loss is the sum of all logits: every channel's score is 1.
    net = Net(lambda m, x: m.a(x).flatten(1).repeat(1, 2), a=conv([[1]] * channels))
    found = trace(net, torch.rand(2, 1, 1, 1), width=width, loss=lambda logits, _: logits.sum(dim=1))
    assert chosen(found, "a", 0) == chosen(found, "a", 1) == list(range(kept))


def test_a_tie_at_the_cut_goes_to_the_lower_index() -> None:
    net = Net(lambda m, x: m.a(x).flatten(1) * torch.tensor([1.0, 2, 3, 2, 2]), a=conv([[1]] * 5))
    found = trace(net, torch.rand(1, 1, 1, 1), width=0.6, loss=lambda logits, _: logits.sum(dim=1))
    assert chosen(found, "a") == [1, 2, 3]


# Against PyTorch's Jacobians


def test_influence_equals_the_full_jacobian() -> None:
    norm = nn.BatchNorm2d(4).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0, -1.5]))
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    first = nn.Conv2d(3, 4, 3, padding=1)
    second = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    middle = nn.Sequential(norm, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    x = torch.randn(3, 3, 7, 6)
    actual = influence(nn.Sequential(first, middle, second), x, "0", "2")

    def segment(z: Tensor) -> Tensor:
        return second(F.max_pool2d(F.relu(norm(z)), 3, 2, 1))

    for sample in range(3):
        z = first(x[sample : sample + 1]).detach()
        jacobian = torch.autograd.functional.jacobian(segment, z)  # (1, C', H', W', 1, C, H, W)
        same(actual[sample], jacobian.abs().sum(dim=(2, 3, 6, 7))[0, :, 0])
    assert (actual[:, :3, 2:] == 0).all() and (actual[:, :3, :2] > 0).any()  # groups do not mix


def test_direct_paths_hold_the_other_layers_fixed() -> None:
    # Dense: c reads [Z_a, Z_b]. The direct influence is that of c's own slice, without the detour through b.
    def run(m: Any, x: Tensor) -> Tensor:
        z = m.a(x)
        return total(m.c(torch.cat([z, m.b(z)], dim=1)))

    net = Net(run, a=nn.Conv2d(1, 2, 1), b=nn.Conv2d(2, 2, 1), c=nn.Conv2d(4, 3, 1))
    found = trace(net, torch.rand(1, 1, 2, 3))
    same(found.influence["a", "c"][0], 6 * net.c.weight[:, :2, 0, 0].abs().detach())
    same(found.influence["b", "c"][0], 6 * net.c.weight[:, 2:, 0, 0].abs().detach())


def test_a_batch_is_its_samples() -> None:
    trunk = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)]
    net = nn.Sequential(*trunk, nn.Flatten(), nn.Linear(20, 3))
    x, y = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    together = trace(net, x, y, width=0.4)
    for sample in range(4):
        alone = trace(net, x[sample : sample + 1], y[sample : sample + 1], width=0.4)
        same(together.influence["0", "3"][sample], alone.influence["0", "3"][0])
        for name in together.layers:
            same(together.scores[name][sample], alone.scores[name][0])
            assert torch.equal(together.masks[name][sample], alone.masks[name][0])
    same(influence(net, x, "0", "3"), together.influence["0", "3"])


# How a network calls its layers


def test_functional_calls_are_named_after_the_running_module() -> None:
    kernel = torch.rand(2, 2, 1, 1)

    def block(_: Any, x: Tensor) -> Tensor:
        z = torch.conv2d(F.conv2d(x, kernel), weight=kernel)
        return torch.convolution(z, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)

    def run(m: Any, x: Tensor) -> Tensor:
        z = m.inner(m.outer(F.conv2d(x, torch.ones(2, 1, 1, 1))))
        return total(F.conv2d(z, torch.ones(3, 2, 1, 1)))

    net = Net(run, outer=nn.Sequential(Net(block), nn.ReLU()), inner=conv([[1, 2], [3, 4]]))
    found = trace(net, torch.rand(1, 1, 2, 2))
    assert found.layers == ("model", "outer.0", "outer.0#2", "outer.0#3", "inner", "model#2")
    assert found.edges == tuple(zip(found.layers, found.layers[1:], strict=False))


def test_other_convolutions_are_no_route_layers() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        z = m.up(m.a(x))
        z = torch.convolution(z, torch.rand(2, 2, 1, 1), None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1).flatten(2)
        z = torch.convolution(z, torch.rand(2, 2, 1), None, [1], [0], [1], False, [0], 1)
        return m.head(m.b(m.line(z).unflatten(2, (4, 4))).flatten(1))

    others = {"up": nn.ConvTranspose2d(2, 2, 2, stride=2), "line": nn.Conv1d(2, 2, 1), "head": nn.Linear(32, 2)}
    net = Net(run, a=nn.Conv2d(1, 2, 1), b=nn.Conv2d(2, 2, 1), **others)
    assert trace(net, torch.rand(1, 1, 2, 2)).edges == (("a", "b"),)


def test_linear_layers_on_request() -> None:
    # a: 2 channels, 2 positions; tokens (position, channel) -> tokens b -> logits c from 2 tokens of 2 features.
    # dz/ds of b at token t is B at the same token: 2 |B|. c reads (t0f0, t0f1, t1f0, t1f1).
    b, c = nn.Linear(2, 2, bias=False), nn.Linear(4, 2, bias=False)
    b.weight.data = torch.tensor([[1.0, -2], [3, 4]])
    c.weight.data = torch.tensor([[1.0, 2, -3, 4], [5, 6, 7, -8]])
    net = Net(lambda m, x: m.c(m.b(m.a(x).flatten(2).mT).flatten(1)), a=conv([[1], [1]]), b=b, c=c)
    found = trace(net, torch.rand(1, 1, 1, 2), torch.tensor([0]), width=0.5, linear=True)
    assert found.edges == (("a", "b"), ("b", "c"))
    same(found.influence["a", "b"], [[[2, 4], [6, 8]]])
    same(found.influence["b", "c"], [[[4, 6], [12, 14]]])
    same(found.scores["c"], [[1, 1]])
    same(found.scores["b"], [[4, 6]])
    same(found.scores["a"], [[6, 8]])
    assert trace(net, torch.rand(1, 1, 1, 2)).layers == ("a",)


# The model and the caller's settings


def test_the_model_is_left_as_it_was() -> None:
    model, x = untidy(), torch.rand(2, 3, 9, 9)
    before, given = state(model), x.clone()
    first, second = trace(model, x), trace(model, x)
    influence(model, x, "0", "3")
    assert state(model) == before
    assert torch.equal(x, given)
    same(first.influence["0", "3"], second.influence["0", "3"])  # dropout was off
    model(x).sum().backward()
    assert model[6].weight.grad is not None


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken inside")


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = untidy().append(Fails())
    before = state(model)
    with pytest.raises(RuntimeError, match="broken inside"):
        trace(model, torch.rand(1, 3, 9, 9))
    with pytest.raises(UserError):
        influence(untidy(), torch.rand(1, 3, 9, 9), "0", "nowhere")
    assert state(model) == before
    assert not F.conv2d(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 1, 1)).requires_grad  # nothing is recorded any more


def test_names_survive_an_exception_that_the_model_handles() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        try:
            m.fails(x)
        except RuntimeError:
            return total(F.conv2d(x, torch.ones(2, 1, 1, 1)))
        raise AssertionError

    assert trace(Net(run, fails=nn.Sequential(Fails())), torch.rand(1, 1, 2, 2)).layers == ("model",)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_of_the_caller_do_not_matter(mode: Callable[[], Any]) -> None:
    model, x = untidy(), torch.rand(2, 3, 9, 9)
    plain = trace(model, x)
    with mode():
        found = trace(model, x.clone())
        margin = trace(model, x.clone(), loss=lambda z, _: z[:, 0] * z[:, 1])
    same(found.influence["0", "3"], plain.influence["0", "3"])
    same(found.scores["6"], plain.scores["6"])
    assert margin.scores["6"].min() > 0
    assert not any(t.requires_grad for t in (*found.scores.values(), *found.influence.values()))


def test_errors_say_what_to_do() -> None:
    net, x = nn.Sequential(conv([[1]]), conv([[1]]), conv([[1], [1]]), nn.Flatten()), torch.rand(2, 1, 1, 1)
    for width in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="width"):
            trace(net, x, width=width)
    for y in (torch.tensor([0]), torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(UserError, match="2 integer labels from 0 to 1"):
            trace(net, x, y)
    with pytest.raises(UserError, match="one loss per sample"):
        trace(net, x, loss=F.cross_entropy)
    with pytest.raises(UserError, match="no route layer is named 'conv9': choose from 0, 1, 2"):
        influence(net, x, "0", "conv9")
    for pair in (("0", "2"), ("1", "0"), ("1", "1")):
        with pytest.raises(UserError, match="not adjacent"):
            influence(net, x, *pair)


def test_models_that_cannot_be_traced_are_refused() -> None:
    x = torch.rand(2, 1, 2, 2)
    with pytest.raises(UserError, match="no route layer"):
        trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), x)
    with pytest.raises(UserError, match=r"\(2, 1, 2, 2\).*logits"):
        trace(conv([[1]]), x)
    with pytest.raises(UserError, match=r"dict.*logits"):
        trace(Net(lambda m, x: {"logits": total(m.a(x))}, a=conv([[1], [1]])), x)
    with pytest.raises(UserError, match="2 samples"):  # samples folded together
        trace(Net(lambda m, x: total(m.a(x.reshape(1, 1, 4, 2))), a=conv([[1], [1]])), x)
    with pytest.raises(UserError, match="2 samples"):  # channels are not samples
        trace(Net(lambda m, x: m.a(x[0]).sum(dim=(1, 2)), a=conv([[1], [1]])), x)
    with pytest.raises(UserError, match="2 samples"):
        trace(Net(lambda m, x: m.a(x.flatten()[:2]), a=nn.Linear(2, 2)), x, linear=True)
