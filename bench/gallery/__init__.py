"""Pictures for docs/gallery.md, each from a run made here: ``python -m bench.gallery``.

drawing               style, and PNGs with the same bytes for the same run
plane                 a landscape in two dimensions, beside flow matching
landscape descents    digits: what the field is, and how samples descend on it
uses                  digits: composing, cleaning, inpainting
outside               digits: scores of what is no digit
page                  docs/gallery.md
"""
