"""What other people's trouble is made of: `data/field` of the shared folder, which is not part of the project."""

from tests.processes import DATA

FIELD = DATA / "field"
ZIPS = [
    ("train-test-folders", {"Normal": 16, "Tumor": 16}, "sides of a split"),
    ("hidden-checkpoints-folder", {"Normal": 8, "Tumor": 8}, "passed over: 4, of which 4 are pictures"),
    ("utf8-names-without-flag-nfd", {"Läsion": 6, "Normal": 6}, ""),
    ("dicom-named-by-uid", {"Normal": 6, "Tumor": 12}, ""),
    ("license-beside-classes", {"Normal": 6, "Tumor": 6}, "passed over: 1"),
    ("narrow-space-in-names", {"Normal": 6, "Tumor": 6}, ""),
]
"""Names in `zips`, the classes that each holds, and words of a warning."""
