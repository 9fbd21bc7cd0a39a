"""Drawn shapes and colours as image folders, and made-up languages: data for tests and for trying the commands.

A class is a shape in a colour; its images differ in place, size, turn and brightness.
"""

from __future__ import annotations

import colorsys
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw


def draw(shape: int, hue: float, size: int, rng: random.Random) -> Image.Image:
    """One picture of a class: a star or polygon of `shape` corners on a noisy ground."""
    ground = tuple(rng.randint(60, 200) for _ in range(3))
    image = Image.new("RGB", (size, size), ground)
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, rng.uniform(0.7, 1.0))
    centre = [size * rng.uniform(0.4, 0.6) for _ in range(2)]
    radius = size * rng.uniform(0.25, 0.4)
    turn = rng.uniform(0, 2 * math.pi)
    corners = 3 + shape % 5
    points = []
    for corner in range(2 * corners):
        inner = 0.45 if shape % 2 and corner % 2 else 1.0 if not corner % 2 else math.cos(math.pi / corners)
        angle = turn + math.pi * corner / corners
        points.append((centre[0] + radius * inner * math.cos(angle), centre[1] + radius * inner * math.sin(angle)))
    ImageDraw.Draw(image).polygon(points, fill=(int(255 * red), int(255 * green), int(255 * blue)))
    return image


def write(folder: Path, *, classes: int, images: int, size: int = 48, seed: int = 0) -> Path:
    """`folder`/<class>/<number>.png, dealt into train, val and test by training.data."""
    rng = random.Random(seed)
    for label in range(classes):
        target = folder / f"class{label:02d}"
        target.mkdir(parents=True, exist_ok=True)
        for number in range(images):
            draw(label, (label * 0.618) % 1.0, size, rng).save(target / f"{number:02d}.png")
    return folder


def language(label: int, *, words: int = 12) -> list[str]:
    """The words of a made-up language: made of few syllables, each language's own."""
    rng = random.Random(label)
    syllables = [rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(5)]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(words)]


def write_texts(folder: Path, *, classes: int, texts: int, seed: int = 0) -> Path:
    """`folder`/<class>/<number>.txt: sentences in made-up languages, of 8 to 20 words."""
    rng = random.Random(seed)
    for label in range(classes):
        target, words = folder / f"class{label:02d}", language(label)
        target.mkdir(parents=True, exist_ok=True)
        for number in range(texts):
            sentence = " ".join(rng.choices(words, k=rng.randint(8, 20)))
            (target / f"{number:02d}.txt").write_text(f"{sentence.capitalize()}.\n")
    return folder
