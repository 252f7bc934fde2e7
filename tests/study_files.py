"""Synthetic studies as files: a DICOM file for each slice, one multi-frame object, or a NIfTI volume."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import nibabel
import numpy as np
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from ml.synthetic.phantom import SLICE_MM, Slice, generate
from ml.synthetic.phantom_files import dicom_bytes

MR_STORAGE, ENHANCED = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.2.1"


@dataclass(frozen=True)
class Study:
    """Slices of a phantom, from head to feet as it is painted; an MR has values of its own, and no window."""

    images: list[Slice]
    modality: str = "CT"

    @property
    def datasets(self) -> list[Dataset]:
        """Of each slice, from the head down."""
        return [self._dataset(image) for image in self.images]

    def slices(self) -> list[bytes]:
        """A file for each slice, from the head down."""
        return [written(dataset) for dataset in self.datasets]

    def multi_frame(self, order: list[int]) -> bytes:
        """One object with the slices in this order, each with its place."""
        datasets = self.datasets
        whole = datasets[0]
        whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = ENHANCED
        whole.SOPInstanceUID = generate_uid(entropy_srcs=[whole.StudyInstanceUID, "whole"])
        whole.file_meta.MediaStorageSOPInstanceUID = whole.SOPInstanceUID
        groups = []
        for number in order:
            place, group = Dataset(), Dataset()
            place.ImagePositionPatient = datasets[number].ImagePositionPatient
            group.PlanePositionSequence = [place]
            groups.append(group)
        del whole.ImagePositionPatient
        whole.NumberOfFrames, whole.PerFrameFunctionalGroupsSequence = len(order), groups
        whole.PixelData = b"".join(self._dataset(self.images[number]).PixelData for number in order)
        return written(whole)

    def volume(self) -> bytes:
        """A NIfTI file as converters write it: axes to the right, the front and the head."""
        upwards = np.stack([self._values(image) for image in reversed(self.images)])
        spacing = self.images[0].spacing
        affine = np.diag([spacing, spacing, SLICE_MM, 1.0])
        affine[2, 3] = -SLICE_MM * (len(self.images) - 1)
        image = nibabel.Nifti1Image(upwards.transpose(2, 1, 0)[::-1, ::-1], affine)
        return bytes(image.to_bytes())

    def _values(self, image: Slice) -> np.ndarray:
        return image.hu if self.modality == "CT" else image.hu + np.int16(1024)

    def _dataset(self, image: Slice) -> Dataset:
        dataset = dcmread(io.BytesIO(dicom_bytes(image)))
        if self.modality != "CT":
            dataset.Modality, dataset.SOPClassUID = self.modality, MR_STORAGE
            dataset.file_meta.MediaStorageSOPClassUID = MR_STORAGE
            for name in ("RescaleIntercept", "RescaleSlope", "RescaleType", "WindowCenter", "WindowWidth"):
                delattr(dataset, name)
        dataset.AccessionNumber = f"ACC{image.seed}"
        return dataset


def written(dataset: Dataset) -> bytes:
    """The bytes of a data set."""
    sink = io.BytesIO()
    dataset.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def make_studies(number: int, slices: int, size: int, seed: int = 50) -> list[Study]:
    """So many studies of other patients, tumours and none in turn; the last one is of MR."""
    pairs = [list(generate(2, slices, seed + one, size)) for one in range(-(-number // 2))]
    split = [half for pair in pairs for half in (pair[:slices], pair[slices:])][:number]
    found = [Study([replace(image, index=index) for index, image in enumerate(images)]) for images in split]
    return [*found[:-1], replace(found[-1], modality="MR")]
