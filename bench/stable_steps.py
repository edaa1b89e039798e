"""How large a delayed step may be on a quadratic, with spike compensation and weight prediction.

    python -m bench.stable_steps

The largest stable product of learning rate and curvature for gradients that are ``n`` updates late, see
:mod:`layerpipe.study.stability`.
"""

from __future__ import annotations

import argparse

from layerpipe.study.stability import largest_stable_step

DELAYS = (0, 1, 3, 7, 14)
KNOBS = ((0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta", type=float, nargs="+", default=[0.9, 0.95, 0.98, 0.99])
    given = parser.parse_args()
    print("| β | c, h | " + " | ".join(f"n = {n}" for n in DELAYS) + " |")
    print("| --- " * (len(DELAYS) + 2) + "|")
    for beta in given.beta:
        for c, h in KNOBS:
            cells = " | ".join(f"{largest_stable_step(n, beta, c, h):.2f}" for n in DELAYS)
            print(f"| {beta:g} | {c:g}, {h:g} | {cells} |")


if __name__ == "__main__":
    main()
