"""Diffusion in log_snr: schedules, the noising process, loss weights, noise and guidance, as pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from .guidance import guide
    from .noise import (
        combine_pyramid,
        gaussian_noise,
        pyramid_noise,
        pyramid_sizes,
        sample_generators,
        training_times,
    )
    from .process import (
        PREDICTION_TYPES,
        SCALERS,
        add_noise,
        expand,
        scales,
        stretch_limits,
        target,
        to_clean,
        to_noise,
    )
    from .schedule import (
        cosine_log_snr,
        cosine_t,
        edm_log_snr,
        linear_log_snr,
        rectified_flow_condition,
        rectified_flow_log_snr,
        shift_log_snr,
        sqrt_log_snr,
        stable_diffusion_log_snr,
        tangent_log_snr,
        warp_times,
    )
    from .weighting import (
        AdaptiveLossWeight,
        bucket_average,
        clipped_snr_weight,
        debiased_weight,
        min_snr_weight,
        p2_weight,
        prediction_factor,
        sech_weight,
        sigmoid_weight,
        truncated_snr_weight,
    )

__all__ = [
    "PREDICTION_TYPES",
    "SCALERS",
    "AdaptiveLossWeight",
    "add_noise",
    "bucket_average",
    "clipped_snr_weight",
    "combine_pyramid",
    "cosine_log_snr",
    "cosine_t",
    "debiased_weight",
    "edm_log_snr",
    "expand",
    "gaussian_noise",
    "guide",
    "linear_log_snr",
    "min_snr_weight",
    "p2_weight",
    "prediction_factor",
    "pyramid_noise",
    "pyramid_sizes",
    "rectified_flow_condition",
    "rectified_flow_log_snr",
    "sample_generators",
    "scales",
    "sech_weight",
    "shift_log_snr",
    "sigmoid_weight",
    "sqrt_log_snr",
    "stable_diffusion_log_snr",
    "stretch_limits",
    "tangent_log_snr",
    "target",
    "to_clean",
    "to_noise",
    "training_times",
    "truncated_snr_weight",
    "warp_times",
]

__getattr__, __dir__ = lazy_exports(globals())
