"""Defined terms of a DICOM header, which may be stored and shown. Free text could hold a name: it becomes "other"."""

from __future__ import annotations

import re

OTHER = "other"
_MODALITY = re.compile(r"[A-Z]{2,16}")
_BODY_PARTS = """
    ABDOMEN ABDOMENPELVIS ABDOMEN_PELVIS ADRENAL ANKLE ANUS AORTA ARM ARTERY ATRIUM AXILLA BACK BLADDER BONE BRAIN
    BREAST BRONCHUS BUTTOCK CALCANEUS CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS
    CHEST_ABDOMEN CHEST_ABD_PELVIS CHOROIDPLEXUS CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORNEA CORONARYARTERY CSPINE
    CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FINGER FOOT GALLBLADDER HAND HEAD HEADNECK
    HEAD_NECK HEART HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM KIDNEY KNEE LARYNX LEG LIVER LSPINE LSSPINE LUNG MAXILLA
    MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NOSE ORBIT OVARY PANCREAS PAROTID PATELLA PELVIS
    PENIS PHARYNX PROSTATE RECTUM RIB SCALP SCAPULA SCLERA SCROTUM SHOULDER SKULL SPINE SPLEEN SSPINE STERNUM STOMACH
    TESTIS THIGH THORAX THUMB THYMUS THYROID TLSPINE TMJ TOE TONGUE TRACHEA TSPINE ULNA URETER URETHRA UTERUS VAGINA
    VULVA WHOLEBODY WRIST ZYGOMA
"""
"""Of PS3.16 annex L, and common spellings of them."""


def modality_of(value: object) -> str | None:
    """A modality, such as CT; None for an empty one."""
    text = _text(value)
    return (text if _MODALITY.fullmatch(text) else OTHER) if text else None


def body_part_of(value: object) -> str | None:
    """A body part, such as KIDNEY; None for an empty one."""
    text = _text(value).replace(" ", "")
    return (text if text in _BODY_PARTS.split() else OTHER) if text else None


def _text(value: object) -> str:
    return str(value or "").strip(" \0").upper()
