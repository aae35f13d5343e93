"""Real colour pictures in named groups, from an npm package: one folder a category.

    npm pack emoji-datasource-twitter && tar -xzf emoji-datasource-twitter-*.tgz
    python -m bench.emoji package emoji

3,786 PNGs of 64 px with transparency, in ten groups. Pictures that differ in skin tone are in the
group of the one that they vary.
"""

import json
import shutil
import sys
from pathlib import Path


def main(package: Path, to: Path) -> None:
    """Copy the pictures of an unpacked package into one folder a category."""
    copied = 0
    for emoji in json.loads((package / "emoji.json").read_text()):
        folder = to / emoji["category"].lower().replace(" & ", "-and-")
        folder.mkdir(parents=True, exist_ok=True)
        for one in (emoji, *emoji.get("skin_variations", {}).values()):
            picture = package / "img/twitter/64" / one["image"]
            if picture.exists():
                shutil.copyfile(picture, folder / picture.name)
                copied += 1
    print(f"{to}: {copied} pictures in {len(list(to.iterdir()))} folders")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m bench.emoji PACKAGE TO")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
