"""Loss weights against the golden tables and closed forms; the adaptive objects against both, and against order."""

from __future__ import annotations

import json

import pytest
import torch

from stable_cascade import diffusion as d
from stable_cascade.config import LoraConfig
from stable_cascade.factory import loss_weight
from tests.golden import FOLDER

TABLES = json.loads((FOLDER / "gdf_tables.json").read_text())
GRID = torch.linspace(-9, 9, 19, dtype=torch.float64)
SNR = GRID.exp()

WEIGHTS = {
    "P2LossWeight()": d.p2_weight,
    "P2LossWeight() clamp_range=[0.1,0.6]": lambda x: d.p2_weight(x).clamp(0.1, 0.6),
    "P2LossWeight(k=0.5,gamma=0.7,s=1.3)": lambda x: d.p2_weight(x, k=0.5, gamma=0.7, s=1.3),
    "MinSNRLossWeight(5)": d.clipped_snr_weight,
    "TruncatedSNRLossWeight(1)": d.truncated_snr_weight,
    "SechLossWeight(2)": d.sech_weight,
    "DebiasedLossWeight()": d.debiased_weight,
    "SigmoidLossWeight(1)": d.sigmoid_weight,
    "ComposedLossWeight(div=SNRLossWeight(),mul=[MinSNRLossWeight(5),SigmoidLossWeight(1)])": lambda x: (
        d.clipped_snr_weight(x) * d.sigmoid_weight(x) / x.exp()
    ),
    "AdaptiveLossWeight()": lambda x: d.AdaptiveLossWeight()(x),
}


def test_every_table_is_covered():
    # Constants, SNR and SNR + 1 are written out where they are used.
    plain = {
        "ConstantLossWeight(v=2)",
        "SNRLossWeight()",
        "SNRPlusOneLossWeight()",
        "MinSNRPlusOneLossWeight(5)",
    }
    assert set(TABLES["loss_weights"]["tables"]) - plain == set(WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_table(name, dtype):
    log_snr = torch.tensor(TABLES["loss_weights"]["logSNR"], dtype=dtype)
    for shift, values in TABLES["loss_weights"]["tables"][name].items():
        actual = WEIGHTS[name](d.shift_log_snr(log_snr, 1 / float(shift)))
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), torch.tensor(values, dtype=torch.float64), rtol=1e-4, atol=2e-5)


def test_min_snr_closed_forms():
    clipped = SNR.clamp(max=5)
    expected = {"epsilon": clipped / SNR, "sample": clipped, "v_prediction": clipped / (SNR + 1)}
    for kind, value in expected.items():
        torch.testing.assert_close(d.min_snr_weight(GRID, 5.0, kind), value)
    torch.testing.assert_close(d.min_snr_weight(GRID, 5.0, "flow"), clipped / (1 + SNR.sqrt()) ** 2)


@pytest.mark.parametrize("scaler", d.SCALERS)
@pytest.mark.parametrize("kind", d.PREDICTION_TYPES)
def test_prediction_factor_is_the_ratio_of_the_errors(kind, scaler):
    """A prediction that is wrong by e leaves a clean sample that is wrong by sqrt(factor) e."""
    noised, prediction = torch.zeros(2, len(GRID), 1, dtype=torch.float64)
    moved = d.to_clean(kind, prediction + 1, noised, GRID, scaler) - d.to_clean(kind, prediction, noised, GRID, scaler)
    torch.testing.assert_close(d.prediction_factor(GRID, kind, scaler), moved[:, 0].square())


def test_equal_emphasis_for_every_prediction():
    """The v loss with min(SNR, 5) / (SNR + 1) is the clean loss with min(SNR, 5), number by number."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, len(GRID), 8, generator=generator, dtype=torch.float64)
    guess = clean + 0.1 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    noised = d.add_noise(clean, noise, GRID)
    implied_noise = d.to_noise("sample", guess, noised, GRID)
    losses = []
    for kind in d.PREDICTION_TYPES:
        error = d.target(kind, guess, implied_noise, GRID) - d.target(kind, clean, noise, GRID)
        losses.append(d.min_snr_weight(GRID, 5.0, kind) * error.square().mean(1))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)


def last_of_each_bucket(weight: d.AdaptiveLossWeight, log_snr: torch.Tensor, loss: torch.Tensor):
    """What the original sees of a batch: the last sample of each bucket."""
    buckets = torch.searchsorted(weight.edges, log_snr).tolist()
    keep = sorted({bucket: position for position, bucket in enumerate(buckets)}.values())
    return log_snr[keep], loss[keep]


def test_adaptive_weight_golden_sequence():
    weight = d.AdaptiveLossWeight()
    assert len(weight.edges) == TABLES["adaptive_loss_weight"]["n_bucket_ranges"]
    for step in TABLES["adaptive_loss_weight"]["steps"]:
        log_snr, loss = torch.tensor(step["logSNR"]), torch.tensor(step["loss"])
        weight.update(*last_of_each_bucket(weight, log_snr, loss), beta=step["beta"])
        expected = torch.ones(300)
        for bucket, value in step["changed_buckets"].items():
            expected[int(bucket)] = value
        torch.testing.assert_close(weight.bucket_losses, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(weight(log_snr), torch.tensor(step["weight_after"]), rtol=1e-6, atol=1e-6)
        shifted = weight(d.shift_log_snr(log_snr, 1 / 2))
        torch.testing.assert_close(shifted, torch.tensor(step["weight_after_shift2"]), rtol=1e-6, atol=1e-6)


def test_every_sample_of_a_bucket_counts():
    weight = d.AdaptiveLossWeight()
    loss = torch.tensor([0.5, 2.0, 1.4])
    weight.update(torch.zeros(3), loss, beta=0.9)
    assert weight(torch.zeros(1)).item() == pytest.approx(1 / (0.9**3 + (1 - 0.9**3) * loss.mean().item()), rel=1e-6)


def test_equal_losses_are_so_many_steps_of_one_sample():
    together, apart = d.AdaptiveLossWeight(), d.AdaptiveLossWeight()
    together.update(torch.full((7,), 1.5), torch.full((7,), 3.0))
    for _ in range(7):
        apart.update(torch.tensor([1.5]), torch.tensor([3.0]))
    torch.testing.assert_close(together.bucket_losses, apart.bucket_losses, rtol=1e-6, atol=0)


def test_any_order_and_any_processes_give_the_same_bits():
    kind = d.AdaptiveLossWeight
    generator = torch.Generator().manual_seed(0)
    log_snr = torch.randn(64, generator=generator).mul(2).round()  # many share a bucket
    loss = torch.rand(64, generator=generator)
    loss[10] = loss[11]
    one = kind()
    one.update(log_snr, loss)
    orders = [torch.randperm(64, generator=generator) for _ in range(5)]
    orders.append(torch.cat([torch.arange(rank, 64, 4) for rank in range(4)]))  # gathered from four processes
    for order in orders:
        other = kind()
        other.update(log_snr[order], loss[order])
        assert all(
            torch.equal(x, y) for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_bucket_sums_do_not_depend_on_the_order():
    """With beta = 0 nothing hides the last bit of the sums, which a sum in the batch's order changes."""
    generator = torch.Generator().manual_seed(0)
    samples = 10 ** (4 * torch.rand(512, generator=generator))
    index = torch.randint(3, (512,), generator=generator)
    one = d.bucket_average(torch.ones(4), index, samples, beta=0.0)
    assert one[3] == 1
    for _ in range(5):
        order = torch.randperm(512, generator=generator)
        assert torch.equal(d.bucket_average(torch.ones(4), index[order], samples[order], beta=0.0), one)


def test_state_comes_back():
    kind = d.AdaptiveLossWeight
    one, other = kind(), kind()
    one.update(torch.tensor([0.0, 3.0]), torch.tensor([0.2, 0.4]))
    state = one.state_dict()
    other.load_state_dict(state)
    one.update(torch.tensor([0.0]), torch.tensor([9.0]))
    (key,) = state
    assert torch.equal(other.state_dict()[key], state[key])
    assert not torch.equal(one.state_dict()[key], state[key])
    with pytest.raises(ValueError, match="buckets"):
        kind(buckets=7).load_state_dict(state)
    with pytest.raises(ValueError, match=key):
        kind().load_state_dict({"losses": state[key]})


@pytest.mark.parametrize(
    ("choice", "prediction_type", "published"),
    [
        ("debiased", "epsilon", d.debiased_weight),
        ("sech", "epsilon", d.sech_weight),
        ("sigmoid", "epsilon", d.sigmoid_weight),
        ("truncated_snr", "sample", d.truncated_snr_weight),
    ],
)
def test_a_weight_of_the_config_is_the_published_one_and_means_the_same_for_every_prediction(
    choice, prediction_type, published
):
    def weight(kind):
        return loss_weight(LoraConfig(loss_weight=choice, prediction_type=kind)).weight(GRID)

    torch.testing.assert_close(weight(prediction_type), published(GRID))
    on_clean = published(GRID) / d.prediction_factor(GRID, prediction_type)
    for kind in d.PREDICTION_TYPES:
        torch.testing.assert_close(weight(kind), on_clean * d.prediction_factor(GRID, kind))


def test_adaptive_weight_stays_in_its_range_and_takes_no_gradient():
    weight = d.AdaptiveLossWeight(weight_range=(0.5, 2.0))
    loss = torch.tensor([1e6, 0.0], requires_grad=True)
    weight.update(torch.tensor([-2.0, 2.0]), loss, beta=0.0)
    values = weight(torch.tensor([-2.0, 2.0]))
    assert values.tolist() == [0.5, 2.0]
    assert not values.requires_grad


@pytest.mark.parametrize(
    "call",
    [
        lambda: d.p2_weight(GRID, k=-1),
        lambda: d.min_snr_weight(GRID, 0.0),
        lambda: d.min_snr_weight(GRID, 5.0, "x0"),
        lambda: d.AdaptiveLossWeight(buckets=1),
    ],
)
def test_refusals(call):
    with pytest.raises(ValueError, match="must") as error:
        call()
    assert "\n" not in str(error.value)
