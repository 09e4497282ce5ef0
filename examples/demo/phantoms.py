"""Makes small, realistic phantom volumes: a body cross-section with organs that differ from case to case.

Each case has its own anatomy (places, sizes, a smooth random deformation), its own contrast, noise, bias field, voxel
size and number of slices. Everything is drawn on a grid twice as fine and averaged down, so that borders are partial
volume. Two structures are labelled: ``gland`` (a lobed, textured organ close to muscle in brightness, among look-alikes that
only their size and place tell from it) and ``bladder`` (variably filled, brighter than fat).

Usage: python phantoms.py nnUNet_raw [--labelled 5] [--unlabelled 32] [--test 8] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, zoom

LABELS = {"background": 0, "gland": 1, "bladder": 2}
LABELLED, UNLABELLED = "Dataset901_PhantomLabelled", "Dataset900_PhantomUnlabelled"
AIR, FAT, MUSCLE, CORTEX, MARROW, VESSEL, NODE, BOWEL, GAS, GLAND, BLADDER = range(11)
FINE = 2


class Anatomy:
    """Paints tissues, largest first, in the deformed coordinates of one case (mm, (z, y, x), 0 in the middle)."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
        self.rng = rng
        self.tissue = np.zeros(shape, np.uint8)
        axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
        self.grid = [g.astype(np.float32) for g in np.meshgrid(*axes, indexing="ij")]
        for g in self.grid:
            g += smooth_noise(rng, shape, spacing, length_mm=18.0) * rng.uniform(0.9, 1.9)

    def ellipsoid(self, centre: tuple, radius: tuple, turn: float = 0.0) -> np.ndarray:
        """Squared normalised distance, < 1 inside; ``turn`` rotates in-plane (radians)."""
        z, y, x = (g - c for g, c in zip(self.grid, centre, strict=True))
        y, x = np.cos(turn) * y - np.sin(turn) * x, np.sin(turn) * y + np.cos(turn) * x
        return (z / radius[0]) ** 2 + (y / radius[1]) ** 2 + (x / radius[2]) ** 2

    def tube(self, centre: tuple, radius: float, lean: tuple, curve: float) -> np.ndarray:
        """Squared normalised distance to a curved line that runs along z."""
        z, y, x = self.grid
        y = y - centre[0] - lean[0] * z - curve * np.sin(z / 14)
        x = x - centre[1] - lean[1] * z - curve * np.cos(z / 11)
        return (y**2 + x**2) / radius**2

    def paint(self, distance: np.ndarray, tissue: int, only: tuple[int, ...] | None = None) -> None:
        inside = distance < 1
        if only is not None:
            inside &= np.isin(self.tissue, only)
        self.tissue[inside] = tissue


def smooth_noise(rng: np.random.Generator, shape: tuple, spacing: tuple, length_mm: float) -> np.ndarray:
    """Random field with zero mean, unit SD and about the given correlation length; drawn on a coarse grid."""
    coarse = [max(4, int(np.ceil(n * s / length_mm)) + 3) for n, s in zip(shape, spacing, strict=True)]
    field = rng.standard_normal(coarse)
    for n, c in zip(shape, coarse, strict=True):
        # Cubic interpolation, one axis after the other: each turn contracts the first axis and appends it at full size.
        field = np.tensordot(field, zoom(np.eye(c), (n / c, 1), order=3), (0, 1))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def draw_anatomy(rng: np.random.Generator, shape: tuple, spacing: tuple) -> np.ndarray:
    """Tissue indices ``(Z, Y, X)`` of one random case."""
    u, a = rng.uniform, Anatomy(rng, shape, spacing)
    far = 1e6
    body, wall = (u(31, 35), u(34, 37)), u(3, 6)
    a.paint(a.ellipsoid((0, u(-1, 1), u(-1, 1)), (far, *body)), FAT)
    a.paint(a.ellipsoid((0, 0, 0), (far, body[0] - wall, body[1] - wall)), MUSCLE)
    # The cavity narrows towards the pelvic floor.
    a.paint(a.ellipsoid((u(22, 28), 1, 0), (u(56, 64), body[0] - wall - u(3, 5), body[1] - wall - u(4, 6))), FAT)
    for side in (-1, 1):
        hip, radius = (u(-8, 8), u(2, 8), side * u(20, 23)), np.array([u(14, 20), u(6, 8), u(4.5, 6)])
        turn = side * u(0.2, 0.6)
        a.paint(a.ellipsoid(hip, radius, turn), CORTEX)
        a.paint(a.ellipsoid(hip, radius - u(1.6, 2.4), turn), MARROW)
        a.paint(a.tube((u(4, 9), side * u(11, 14)), u(4, 5.5), (u(-0.1, 0.1), side * u(-0.1, 0.1)), u(0, 1.5)), MUSCLE)
        a.paint(a.tube((u(-9, -3), side * u(12, 16)), u(1.4, 2.3), (u(-0.2, 0.2), u(-0.2, 0.2)), u(0.5, 2)), VESSEL)
    sacrum, thick = (u(22, 34), u(21, 24), u(-2, 2)), np.array([u(42, 50), u(5, 7), u(8, 10)])
    a.paint(a.ellipsoid(sacrum, thick), CORTEX)
    a.paint(a.ellipsoid(sacrum, thick - 2.2), MARROW)
    rectum = (u(11, 14), u(-4, 4))
    lean, curve = (u(-0.15, 0.15), u(-0.2, 0.2)), u(0.5, 2.5)
    a.paint(a.tube(rectum, u(4, 5.8), lean, curve), BOWEL)
    a.paint(a.tube(rectum, u(1.0, 3.0), lean, curve), GAS if u() < 0.6 else BOWEL)
    for _ in range(rng.integers(4, 8)):
        a.paint(a.ellipsoid((u(10, 50), u(-16, 4), u(-17, 17)), (u(5, 9), u(3, 6), u(3, 6)), u(0, 3)), BOWEL, (FAT,))
    centre = np.array([u(-15, -5), u(-1, 4), u(-4, 4)])
    fill = u(0.95, 1.2)
    bladder = centre + (u(17, 21), u(-10, -6), u(-3, 3))
    a.paint(a.ellipsoid(bladder, fill * np.array([u(11, 14), u(9, 12), u(11, 14)]), u(-0.3, 0.3)), BLADDER)
    size = u(1.1, 1.35)
    for side in (-1, 1):
        lobe = centre + (u(-1.5, 1.5), u(-1, 1), side * size * u(4, 5.5))
        a.paint(a.ellipsoid(lobe, size * np.array([u(12, 15), u(8, 10), u(8, 9.5)]), side * u(0, 0.5)), GLAND)
    for _ in range(rng.integers(6, 12)):
        # Look-alikes: as bright as the gland and of its texture, smaller, anywhere in fat and muscle.
        a.paint(
            a.ellipsoid((u(-45, 45), u(-18, 18), u(-22, 22)), (u(6, 12), u(4, 8), u(4, 8)), u(0, 3)),
            NODE,
            (FAT, MUSCLE),
        )
    return a.tissue


def draw_image(rng: np.random.Generator, tissue: np.ndarray, spacing: tuple) -> np.ndarray:
    """Signal without noise: tissue contrast of this scan, texture within tissues, bias field."""
    u = rng.uniform
    muscle, fat = u(0.26, 0.36), u(0.8, 1.0)
    fluid = fat * u(1.2, 1.7)
    gland = u(0.46, 0.66)
    mean = np.zeros(11)
    mean[[AIR, FAT, MUSCLE, CORTEX, MARROW]] = 0.01, fat, muscle, u(0.05, 0.12), u(0.5, 0.85)
    mean[[VESSEL, NODE, BOWEL, GAS, GLAND]] = u(0.08, 0.9), gland * u(0.97, 1.03), u(0.2, 0.45), 0.03, gland
    mean[BLADDER] = fluid
    texture = np.full(11, 0.05)
    texture[[AIR, GAS, CORTEX, BLADDER, GLAND, BOWEL]] = 0.0, 0.0, 0.02, 0.015, u(0.06, 0.14), 0.12
    texture[NODE] = texture[GLAND]
    fine = 0.6 * smooth_noise(rng, tissue.shape, spacing, 2.5) + 0.6 * smooth_noise(rng, tissue.shape, spacing, 6.0)
    image = mean[tissue] * (1 + texture[tissue] / 0.4 * fine)
    return image * np.exp(u(0.05, 0.2) * smooth_noise(rng, tissue.shape, spacing, 60.0))


def make_case(seed: list[int]) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """One case: image (int16), labels (uint8), both (Z, Y, X), and the voxel size in mm; a pure function of the seed."""
    rng = np.random.default_rng(seed)
    plane = rng.uniform(2.2, 2.4)
    spacing = (float(rng.choice([4.2, 4.5, 4.8])), plane, plane)
    shape = (int(rng.integers(20, 24)), int(rng.integers(31, 34)), int(rng.integers(31, 34)))
    fine_shape, fine_spacing = tuple(FINE * n for n in shape), tuple(s / FINE for s in spacing)
    tissue = draw_anatomy(rng, fine_shape, fine_spacing)
    blurred = gaussian_filter(draw_image(rng, tissue, fine_spacing), (0.8, 0.7, 0.7))

    def average(x: np.ndarray) -> np.ndarray:
        return x.reshape(shape[0], FINE, shape[1], FINE, shape[2], FINE).mean((1, 3, 5))

    image, sigma = average(blurred), rng.uniform(0.015, 0.045)
    image = np.hypot(image + sigma * rng.standard_normal(shape), sigma * rng.standard_normal(shape))
    shares = np.stack([average((tissue == t).astype(np.float32)) for t in (GLAND, BLADDER)])
    labels = np.where(shares.max(0) >= 0.5, shares.argmax(0) + 1, 0).astype(np.uint8)
    return (image * rng.uniform(300, 1500)).astype(np.int16), labels, spacing


def write(array: np.ndarray, file: Path, spacing: tuple[float, float, float]) -> None:
    volume = sitk.GetImageFromArray(array)
    volume.SetSpacing([float(s) for s in reversed(spacing)])
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, str(file))


def write_datasets(raw: Path, labelled: int = 5, unlabelled: int = 32, test: int = 8, seed: int = 0) -> None:
    """Write ``Dataset901_PhantomLabelled`` (with test cases in imagesTs / labelsTs) and ``Dataset900_PhantomUnlabelled``."""
    parts = [(LABELLED, "Tr", labelled), (LABELLED, "Ts", test), (UNLABELLED, "Tr", unlabelled)]
    for part, (dataset, split, count) in enumerate(parts):
        for i in range(count):
            image, labels, spacing = make_case([seed, part, i])
            name = f"{ {'Tr': 'case', 'Ts': 'test'}[split] if dataset == LABELLED else 'scan' }_{i:03d}"
            write(image, raw / dataset / f"images{split}" / f"{name}_0000.nii.gz", spacing)
            if dataset == LABELLED:
                write(labels, raw / dataset / f"labels{split}" / f"{name}.nii.gz", spacing)
    for dataset, count in ((LABELLED, labelled), (UNLABELLED, unlabelled)):
        content = {"channel_names": {"0": "MR"}, "labels": LABELS, "numTraining": count, "file_ending": ".nii.gz"}
        (raw / dataset / "dataset.json").write_text(json.dumps(content, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="the nnUNet_raw folder to write to")
    for name, default in (("labelled", 5), ("unlabelled", 32), ("test", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    write_datasets(args.raw, args.labelled, args.unlabelled, args.test, args.seed)


if __name__ == "__main__":
    main()
