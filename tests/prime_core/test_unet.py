"""The image network: gathered logits equal dense ones, a row does not feel its neighbours, and every weight learns."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kernels.group_norm import is_channels_last
from prime_core.config import CodecConfig, UNetConfig
from prime_core.models import unet, unet_layers
from prime_core.models.unet import MIN_DENSE_POSITIONS, UNet
from prime_core.models.unet_layers import trunk_memory_format
from prime_core.schedule import PolynomialSchedule
from tests.prime_core.small_unet import CODEC, LENGTH, digits, make_config, make_network, packed
from tests.published import DATA
from tests.reference_unet import Net


class TestOutputs:
    def test_the_published_code_agrees(self) -> None:
        expected = load_file(DATA / "unet_l2.safetensors")
        config = UNetConfig(
            height=8,
            width=8,
            model_channels=32,
            channel_mult=(3, 3),
            num_res_blocks=1,
            head_channels=32,
        )
        codec = CodecConfig(vocab_size=256, target_length=2)
        with torch.random.fork_rng(devices=[]):
            network = UNet(config, codec, PolynomialSchedule(3.0))
        state = {
            name.removeprefix("model.").removeprefix("unet."): tensor.float()
            for name, tensor in expected.items()
            if name.startswith("model.")
        }
        network.load_state_dict(state)
        logits = network.eval()(expected["y"].unflatten(1, (3, 2)).movedim(2, -1))
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)

    def test_the_description_agrees(self) -> None:
        net = Net(3, 2, 4, 16, (96, 64), blocks=2, rates=(1, 2), labels=3)
        config = make_config(num_res_blocks=2, attention_rates=(1, 2), labels="class", num_labels=3)
        with torch.random.fork_rng(devices=[]):
            network = UNet(config, CODEC, PolynomialSchedule(3.0))
        tensors = net.tensors()
        network.load_state_dict(
            {n.removeprefix("model.").removeprefix("unet."): t for n, t in tensors.items()}
        )
        labels = torch.tensor([2, 0, 1])
        logits = network.eval()(digits(), labels=labels)
        assert (logits.shape, logits.dtype) == ((3, 3, 8, 4, 16), torch.float32)
        torch.testing.assert_close(logits.double(), net.logits(tensors, digits(), labels), rtol=0, atol=1e-3)

    def test_gathered_logits_equal_the_dense_ones(self, network: UNet) -> None:
        dense = network(digits()).flatten(0, 3)
        everywhere = network.features(*packed(digits()))
        assert len(everywhere) == len(dense) == 3 * LENGTH < MIN_DENSE_POSITIONS
        torch.testing.assert_close(network.head(everywhere), dense, rtol=0, atol=1e-5)
        positions = torch.tensor([200, 0, 95, 5, 5, 287, 96])
        some = network.features(*packed(digits()), positions=positions)
        torch.testing.assert_close(network.head(some), dense[positions], rtol=0, atol=1e-5)
        torch.testing.assert_close(network.head(some[2:4]), dense[positions[2:4]], rtol=0, atol=1e-5)
        parts = torch.cat([network.head(part) for part in some.split(3)])
        torch.testing.assert_close(parts, dense[positions], rtol=0, atol=1e-5)
        none = network.features(*packed(digits()), positions=positions[:0])
        assert network.head(none).shape == (0, 16)

    def test_many_positions_take_the_dense_path(self, network: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
        y_t = digits(24)
        dense = network(y_t).flatten(0, 3)
        inside = torch.arange(5 * LENGTH, 20 * LENGTH)[torch.arange(15 * LENGTH) % 7 != 0].flip(0)
        features = network.features(*packed(y_t), positions=inside)

        def never(*_: Any) -> Tensor:
            raise AssertionError("the gathered path ran")

        monkeypatch.setattr(network, "_gathered_logits", never)
        assert len(inside) >= MIN_DENSE_POSITIONS
        torch.testing.assert_close(network.head(features), dense[inside], rtol=0, atol=1e-5)
        with pytest.raises(AssertionError, match="gathered path"):
            network.head(features[: MIN_DENSE_POSITIONS - 1])
        everywhere = torch.arange(0, 24 * LENGTH, 24 // 11)
        sparse = network.features(*packed(y_t), positions=everywhere)
        assert len(sparse) >= MIN_DENSE_POSITIONS
        torch.testing.assert_close(network.head(sparse), dense[everywhere], rtol=0, atol=1e-5)
        far_apart = torch.cat([torch.arange(512), torch.arange(512) + 23 * LENGTH - 512])
        with pytest.raises(AssertionError, match="gathered path"):
            network.head(network.features(*packed(y_t), positions=far_apart))

    def test_sizes_of_pictures_are_free(self, network: UNet) -> None:
        y_t = torch.randint(0, 5, (1, 3, 6, 10, 2), generator=torch.Generator().manual_seed(0))
        assert network(y_t).shape == (1, 3, 6, 10, 16)

    def test_layout_of_digits_does_not_matter(self, network: UNet) -> None:
        y_t = digits()
        strided = y_t.movedim(-1, 0).contiguous().movedim(0, -1)
        assert not strided.is_contiguous()
        for same in (strided, y_t.int(), y_t.to(torch.uint8)):
            assert torch.equal(network(y_t), network(same))

    def test_order_of_digits_and_channels_matters(self, network: UNet) -> None:
        assert not torch.allclose(network(digits()), network(digits().flip(-1)))
        assert not torch.allclose(network(digits()), network(digits().flip(1)).flip(1))

    def test_fresh_networks_predict_uniformly(self) -> None:
        with torch.random.fork_rng(devices=[]):
            fresh = UNet(make_config(), CODEC, PolynomialSchedule(3.0))
        assert torch.equal(fresh(digits()), torch.zeros(3, 3, 8, 4, 16))

    def test_half_precision_stays_close(self, network: UNet) -> None:
        half = make_network().bfloat16()
        logits, full = half(digits()), network(digits())
        assert logits.dtype == torch.float32
        assert 0 < (logits - full).norm() < 0.05 * full.norm()


class TestMemoryFormat:
    """CUDA keeps the features of a pixel side by side; here a CPU is made to."""

    def test_is_chosen_by_the_device(self) -> None:
        assert trunk_memory_format(torch.device("cuda")) == torch.channels_last
        assert trunk_memory_format(torch.device("cpu")) == torch.contiguous_format

    @pytest.mark.parametrize("labels", ["none", "class"])
    def test_channels_last_gives_the_same_logits(self, labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
        network = make_network(labels=labels, num_labels=3 if labels == "class" else 1).requires_grad_(False)
        given = torch.arange(3) if labels == "class" else None
        positions = torch.arange(0, 3 * LENGTH, 7)
        expected = network(digits(), labels=given)
        monkeypatch.setattr(unet_layers, "trunk_memory_format", lambda device: torch.channels_last)
        monkeypatch.setattr(unet, "trunk_memory_format", lambda device: torch.channels_last)
        network.to("cpu")
        weight = network.get_parameter("input_blocks.1.0.in_layers.2.weight")
        assert is_channels_last(weight)
        seen: list[bool] = []
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d) and name != "out.2":
                module.register_forward_hook(
                    lambda _, given, out: seen.extend(map(is_channels_last, (*given, out)))
                )
        torch.testing.assert_close(network(digits(), labels=given), expected, rtol=0, atol=1e-5)
        assert len(seen) > 10 and all(seen)  # nothing on the way falls back to planes
        features = network.features(*packed(digits()), positions=positions, labels=given)
        assert is_channels_last(features.map)
        shown = expected.flatten(0, 3)[positions]
        torch.testing.assert_close(network.head(features), shown, rtol=0, atol=1e-5)
        monkeypatch.undo()
        assert network.to("cpu").get_parameter("input_blocks.1.0.in_layers.2.weight").is_contiguous()

    def test_channels_last_learns_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        grads = []
        for layout in (torch.contiguous_format, torch.channels_last):
            monkeypatch.setattr(unet_layers, "trunk_memory_format", lambda device, layout=layout: layout)
            network = make_network().train()
            network(digits()).square().mean().backward()
            grads.append([p.grad for p in network.parameters() if p.grad is not None])
        assert len(grads[0]) == len(grads[1]) > 40
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 + 1e-3 * float(a.abs().max()))


class TestBatches:
    @pytest.mark.parametrize("time_conditioned", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_row_does_not_feel_its_neighbours(self, dtype: torch.dtype, time_conditioned: bool) -> None:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            pytest.skip("this CPU has no bfloat16 arithmetic")
        network = make_network(labels="class", num_labels=8, time_conditioned=time_conditioned)
        network = network.to(dtype).requires_grad_(False)
        rows, masked = digits(8), torch.full((1, 3, 8, 4, 2), CODEC.base)
        shown = torch.tensor([3, 50, 77])
        results = []
        for order in ([5], [5, 1], [0, 5, 2], [7, 6, 5, 4, 3, 2, 1, 0], [1, 2, 3, 4, 5]):
            filler = network.fill([LENGTH] * len(order))
            y_t = torch.cat([rows[order], masked.expand(len(filler), -1, -1, -1, -1)])
            labels = torch.tensor([*order, *(0 for _ in filler)])
            t = (labels + 1) / 9
            place = order.index(5) * LENGTH
            positions = torch.cat([shown + place, torch.arange(0, len(order) * LENGTH, 11)])
            results.append(network.head(network.features(*packed(y_t), t, positions, labels))[:3])
        for result in results[1:]:
            assert torch.equal(result, results[0])
        assert not torch.equal(results[0][0], results[0][1])

    def test_rows_do_not_see_each_other(self, network: UNet) -> None:
        y_t = digits()
        changed = y_t.clone()
        changed[0] = (changed[0] + 1) % (CODEC.base + 1)
        before, after = network(y_t), network(changed)
        assert not torch.equal(before[0], after[0])
        assert torch.equal(before[1:], after[1:])

    def test_fill(self, network: UNet) -> None:
        sizes = {num_rows: num_rows + len(network.fill([LENGTH] * num_rows)) for num_rows in range(1, 200)}
        assert all(num_rows <= size < 1.5 * num_rows + 16 for num_rows, size in sizes.items())
        assert len(set(sizes.values())) < 24
        assert (sizes[1], sizes[5]) == (2, 6)
        assert make_network().bfloat16().fill([LENGTH]) == []
        assert set(network.fill([LENGTH] * 5)) == {LENGTH}


class TestGradients:
    @pytest.mark.parametrize(
        "others", [{}, {"time_conditioned": True, "labels": "class", "num_labels": 3}], ids=["plain", "all"]
    )
    def test_every_parameter_learns(self, others: dict[str, Any]) -> None:
        network = make_network(**others).train()
        t, labels = (torch.tensor([0.2, 0.5, 0.8]), torch.arange(3)) if others else (None, None)
        positions = torch.arange(0, 3 * LENGTH, 5)
        network.head(network.features(*packed(digits()), t, positions, labels)).square().sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            # A norm that follows a convolution takes its bias away where a group is a single channel.
            share = (parameter.grad != 0).float().mean()
            assert share > (0.75 if name == "pixel_embedding.embedding_table.weight" else 0.9), name

    def test_nothing_masked(self) -> None:
        network = make_network().train()
        empty = network.features(*packed(digits()), positions=torch.tensor([], dtype=torch.int64))
        network.head(empty).sum().backward()
        for name, parameter in network.named_parameters():
            assert (parameter.grad is None) == name.startswith("out.2"), name
            assert parameter.grad is None or not parameter.grad.any()

    def test_dropout_only_in_training(self) -> None:
        network = make_network(dropout=0.5).requires_grad_(False)
        assert torch.equal(network(digits()), network(digits()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            assert not torch.equal(network.train()(digits()), network(digits()))
