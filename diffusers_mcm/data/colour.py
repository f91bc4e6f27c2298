"""Colours beyond an ordinary screen's: HDR and wide gamuts, brought to what such a screen shows."""

import numpy as np

from .faults import UnusableItem

# The numbers are those of ITU-T H.273, which FFmpeg uses too.
BT709, UNSPECIFIED, BT2020 = 1, 2, 9
PQ, HLG = 16, 18
_RESERVED = {0, 3}
#: Transfer characteristics that an ordinary screen shows as they are: the gamma curves of television and of sRGB.
_ORDINARY_TRANSFERS = {1, UNSPECIFIED, 4, 5, 6, 7, 11, 12, 13, 14, 15} | _RESERVED
#: Matrices from RGB to YUV that swscale inverts: RGB itself, BT.709, FCC, BT.601 twice, SMPTE 240M, BT.2020.
_KNOWN_MATRICES = {0, 1, UNSPECIFIED, 3, 4, 5, 6, 7, BT2020}

_D65, _C = (0.3127, 0.3290), (0.310, 0.316)
# Chromaticities of red, green, blue and white. Those of BT.601 and of the EBU are shown as BT.709's, from which they
# differ by a hair.
_BT709_PRIMARIES = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), _D65)
_P3_PRIMARIES = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65)
_SHOWN_AS_BT709 = {BT709, UNSPECIFIED, 5, 6, 7, 22} | _RESERVED
_OTHER_PRIMARIES = {
    4: ((0.670, 0.330), (0.210, 0.710), (0.140, 0.080), _C),  # NTSC of 1953
    8: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), _C),  # film
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    11: _P3_PRIMARIES,  # but for the white of a cinema, which is not to look green on a screen
    12: _P3_PRIMARIES,
}
# From CIE XYZ to the responses of the eye's cones, after Bradford.
_CONES = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

#: Luminance of white on the ordinary screen (BT.2408), and the brightest light of a film that still differs.
_WHITE_NITS, _PEAK_NITS = 203.0, 1000.0
_GAMMA = 2.4  # BT.1886
_PQ_M1, _PQ_M2, _PQ_C1, _PQ_C2, _PQ_C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
_HLG_A, _HLG_B, _HLG_C = 0.17883277, 0.28466892, 0.55991073


def check_known(transfer: int, matrix: int, primaries: int = UNSPECIFIED) -> None:
    """`UnusableItem` for what would be shown in wrong colours: curves, matrices and primaries nobody here inverts.

    Such are logarithmic, linear or cinema curves, matrices such as ICtCp, and primaries such as XYZ.
    """
    for what, number, known in (
        ("transfer characteristic", transfer, _ORDINARY_TRANSFERS | {PQ, HLG}),
        ("colour matrix", matrix, _KNOWN_MATRICES),
        ("primary colours", primaries, _SHOWN_AS_BT709 | _OTHER_PRIMARIES.keys()),
    ):
        if number not in known:
            raise UnusableItem(f"its {what} (number {number} of H.273) cannot be converted")


def is_ordinary(transfer: int, primaries: int) -> bool:
    """Whether a film's colours can be shown as they are."""
    return transfer not in (PQ, HLG) and primaries not in _OTHER_PRIMARIES


def _rgb_to_xyz(primaries) -> np.ndarray:
    """From light of these primaries to CIE XYZ, as an eye sees it whose white is that of BT.709."""
    *colours, white, daylight = (np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in (*primaries, _D65))
    columns = np.stack(colours, axis=1)
    gains = (_CONES @ daylight) / (_CONES @ white)
    adapt = np.linalg.solve(_CONES, gains[:, None] * _CONES)
    return adapt @ (columns * np.linalg.solve(columns, white))


def _pq_to_nits(signal: np.ndarray) -> np.ndarray:
    """The EOTF of SMPTE ST 2084: a signal in [0, 1] to cd/m² in [0, 10000]."""
    root = signal ** (1 / _PQ_M2)
    return 10000 * (np.maximum(root - _PQ_C1, 0) / (_PQ_C2 - _PQ_C3 * root)) ** (1 / _PQ_M1)


def _nits_to_pq(nits: np.ndarray | float) -> np.ndarray:
    power = (nits / 10000) ** _PQ_M1
    return ((_PQ_C1 + _PQ_C2 * power) / (1 + _PQ_C3 * power)) ** _PQ_M2


def _hlg_to_nits(signal: np.ndarray) -> np.ndarray:
    """Inverse OETF and OOTF of BT.2100 for a screen of 1000 cd/m² (system gamma 1.2)."""
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - _HLG_C) / _HLG_A) + _HLG_B) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593])
    return _PEAK_NITS * scene * luminance[..., None] ** 0.2


def _compress(nits: np.ndarray) -> np.ndarray:
    """The EETF of BT.2390 (5.4.1) from 1000 cd/m² to 203, on the largest of R, G and B, which keeps the hue."""
    largest = np.maximum(nits.max(axis=-1, keepdims=True), 1e-6)
    source_peak, target_peak = _nits_to_pq(_PEAK_NITS), _nits_to_pq(_WHITE_NITS)
    level, ceiling = np.minimum(_nits_to_pq(largest) / source_peak, 1), target_peak / source_peak
    knee = 1.5 * ceiling - 0.5
    t = np.maximum((level - knee) / (1 - knee), 0)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * ceiling
    return nits * _pq_to_nits(np.where(level < knee, level, spline) * source_peak) / largest


def to_ordinary(signal: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Colours of HDR, of a wide gamut or of old television, as a screen of BT.709's colours and gamma 2.4 shows them.

    HDR is taken to be mastered for 1000 cd/m²; its light is compressed as BT.2390 says, so that what is not brighter
    than a face keeps its luminance relative to white at 203 cd/m². Colours out of the gamut are clipped.
    `signal` is RGB as the film stores it, (…, 3), floating point in [0, 1]; the result is uint8 (…, 3).
    """
    signal = np.clip(signal, 0, 1).astype(np.float64)
    if transfer in (PQ, HLG):
        light = _compress(_pq_to_nits(signal) if transfer == PQ else _hlg_to_nits(signal)) / _WHITE_NITS
        if primaries in _RESERVED | {UNSPECIFIED}:
            primaries = BT2020
    else:
        light = signal**_GAMMA
    if primaries in _OTHER_PRIMARIES:
        matrix = np.linalg.solve(_rgb_to_xyz(_BT709_PRIMARIES), _rgb_to_xyz(_OTHER_PRIMARIES[primaries]))
        light = light @ matrix.T
    return np.rint(np.clip(light, 0, 1) ** (1 / _GAMMA) * 255).astype(np.uint8)
