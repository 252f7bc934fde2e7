"""Pixels: decoding of pictures and DICOM, transforms, augmentation, input statistics."""
