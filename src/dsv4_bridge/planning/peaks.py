"""Peak speed of common accelerators, and the share of it that a run reaches.

TFLOP/s of dense bf16 products with float32 sums, without structured sparsity, as the makers' data sheets
give them (their figures with sparsity halved): NVIDIA's for A100, H100, H200, L40S, H20, RTX PRO 6000
Blackwell, DGX and HGX B200, GB200 and GB300; AMD's for MI300X, MI325X, MI355X.
"""

from ..errors import BridgeError

# As the driver names the device, without its maker; the longest name that the device's contains counts.
PEAK_TFLOPS: dict[str, float] = {
    "A100": 312.0,
    "H100": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "GH200": 989.4,
    "H20": 148.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "GB300": 2500.0,
    "L40S": 362.0,
    "RTX PRO 6000 Blackwell": 503.8,
    "MI300X": 1307.4,
    "MI325X": 1307.4,
    "MI355X": 2516.6,
}


def peak_tflops(device: str) -> float | None:
    """Peak of a device by its name, as `torch.cuda.get_device_name` gives it, any case; None: not known."""
    words = f" {device.lower().replace('-', ' ')} "
    known = [name for name in PEAK_TFLOPS if f" {name.lower()} " in words]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def peak_named(device: str) -> float:
    """The same for a device that a user names.

    Raises:
        BridgeError: not known.
    """
    peak = peak_tflops(device)
    if peak is None:
        raise BridgeError(f"looking up the peak of {device!r}: not known; known are {', '.join(PEAK_TFLOPS)}")
    return peak


def mfu(flops_per_token: float, tokens_per_second: float, peak: float) -> float:
    """Model FLOPs utilisation of one device, 0 to 1.

    Args:
        flops_per_token: of training, see `flops.flops_per_token`.
        tokens_per_second: of one device.
        peak: its TFLOP/s.
    """
    return flops_per_token * tokens_per_second / (peak * 1e12)
