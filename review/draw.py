"""Draw a Vega-Lite plot: standard input is its JSON, standard output a PNG.

A process of its own, because the JSON comes from a reviewed revision and may need unlimited time and memory; V8 ends
the whole process then. It can't read files or the network.
"""

import re
import sys

import vl_convert

MAX_PIXELS = 4_000_000


def main() -> None:
    try:
        svg = vl_convert.vegalite_to_svg(sys.stdin.read(), allowed_base_urls=[])
    except ValueError as error:
        sys.exit(str(error))
    # vl_convert would load images from any address, also where it refuses data.
    if "<image" in svg:
        sys.exit("error: image marks are not drawn")
    width, height = (float(number) for number in re.findall(r' (?:width|height)="([\d.]+)"', svg)[:2])
    if width * height > MAX_PIXELS:
        sys.exit(f"error: {width:.0f} x {height:.0f} pixels are too many; at most {MAX_PIXELS:,} are drawn")
    sys.stdout.buffer.write(vl_convert.svg_to_png(svg, scale=1.5))


if __name__ == "__main__":
    main()
