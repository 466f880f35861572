"""Labelled sentences in which words are abbreviated as in clinical records: diseases, and what is none.

Abstracts spell diseases out, so a model that is trained on them misses HTN and COPD. Here mentions that a model finds
in reports are replaced by abbreviations from a list (mention replacement, after Dai and Adel 2020, "An Analysis of
Simple Data Augmentation for Named Entity Recognition"). What is replaced by what is left to chance: the words around a
mention say that it is a disease, seldom which one.

From that alone a model learns that whatever is short is a disease. So the phrases around the mentions, and in sentences
without any, become the shorthand that records have for them, and headings of records stand alone without a mention.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from medner.datasets import Document

#: Of diseases in records of adults, common ones first. Those that as often stand for something else (PE, MS, RA) are
#: left out, and those that are words in small letters (CAP, HIT, AIDS), which an uncased model cannot tell apart.
ABBREVIATIONS = (
    "HTN", "DM", "DM2", "T2DM", "DM II", "IDDM", "NIDDM", "CAD", "CHF", "COPD", "CKD", "ESRD", "GERD", "HLD", "AFib",
    "A-fib", "AF", "MI", "NSTEMI", "STEMI", "CVA", "TIA", "DVT", "VTE", "OSA", "UTI", "URI", "AKI", "ARF", "PVD",
    "BPH", "OA", "DJD", "DDD", "IBS", "IBD", "UC", "PUD", "NASH", "NAFLD", "HCC", "RCC", "NSCLC", "SCLC", "AML", "CLL",
    "CML", "MDS", "DLBCL", "SLE", "JRA", "ALS", "ADHD", "PTSD", "OCD", "MDD", "GAD", "TB", "ARDS", "ILD",
    "SBO", "AAA", "SVT", "LVH", "HOCM", "DCM", "HFrEF", "HFpEF", "PCOS", "RLS", "DKA", "SIADH", "TTP", "ITP", "DIC",
    "ICH", "SAH", "SDH", "NPH", "PKD", "VUR", "PID", "STD",
)  # fmt: skip

#: Phrases of reports that are no diseases, and what records write in their place.
SHORTHAND = {
    "abdomen": "abd", "abdominal": "abd", "activities of daily living": "ADLs", "appointment": "appt",
    "as needed": "PRN", "at bedtime": "QHS", "bilateral": "b/l", "blood pressure": "BP", "blood urea nitrogen": "BUN",
    "body mass index": "BMI", "bowel movement": "BM", "by mouth": "PO", "cardiovascular": "CV",
    "cerebrospinal fluid": "CSF", "cervical spine": "C-spine", "chest x-ray": "CXR", "chief complaint": "CC",
    "colonoscopy": "c-scope", "complaining of": "c/o", "complains of": "c/o", "complete blood count": "CBC",
    "computed tomography": "CT", "consistent with": "c/w", "consultation": "consult",
    "coronary artery bypass graft": "CABG", "coronary artery bypass grafting": "CABG", "ct scan": "CT",
    "deep tendon reflexes": "DTRs", "diagnosed with": "dx w/", "diagnosis": "dx", "discharge": "d/c",
    "discontinued": "d/c'd", "ear, nose and throat": "ENT", "ejection fraction": "EF", "electrocardiogram": "EKG",
    "emergency department": "ED", "emergency room": "ER", "estimated blood loss": "EBL", "every day": "QD",
    "examination": "exam", "extraocular movements": "EOM", "extremities": "ext", "family history": "FHx",
    "follow up": "f/u", "follow-up": "f/u", "followup": "f/u", "four times a day": "QID", "gastrointestinal": "GI",
    "general appearance": "gen", "genitourinary": "GU", "heart rate": "HR", "hematocrit": "Hct", "hemoglobin": "Hgb",
    "history": "hx", "history and physical": "H&P", "history of": "h/o", "history of present illness": "HPI",
    "hospital": "hosp", "hours": "hrs", "intensive care unit": "ICU", "intravenous": "IV", "intravenously": "IV",
    "laboratory": "lab", "left lower extremity": "LLE", "left lower quadrant": "LLQ", "left upper extremity": "LUE",
    "level of consciousness": "LOC", "lower extremities": "LEs", "lumbar spine": "L-spine",
    "magnetic resonance imaging": "MRI", "medication": "med", "medications": "meds", "months": "mos",
    "musculoskeletal": "MSK", "negative for": "neg for", "neurologic": "neuro", "neurological": "neuro",
    "no acute distress": "NAD", "no known drug allergies": "NKDA", "normal saline": "NS", "nothing by mouth": "NPO",
    "operating room": "OR", "oxygen": "O2", "oxygen saturation": "O2 sat", "past medical history": "PMH",
    "past surgical history": "PSH", "patient": "pt", "patients": "pts", "physical examination": "PE",
    "physical therapy": "PT", "postoperative day": "POD", "postoperatively": "post-op", "prescription": "Rx",
    "primary care physician": "PCP", "prior to admission": "PTA", "pulmonary": "pulm",
    "pupils equal, round and reactive to light": "PERRL", "range of motion": "ROM", "regular rate and rhythm": "RRR",
    "respiratory": "resp", "respiratory rate": "RR", "review of systems": "ROS", "right lower extremity": "RLE",
    "right lower quadrant": "RLQ", "right upper extremity": "RUE", "right upper quadrant": "RUQ", "rule out": "r/o",
    "secondary to": "2/2", "social history": "SHx", "status post": "s/p", "surgery": "surg", "symptoms": "sx",
    "temperature": "temp", "three times a day": "TID", "total abdominal hysterectomy": "TAH", "treatment": "tx",
    "twice a day": "BID", "twice daily": "BID", "tympanic membranes": "TMs", "ultrasound": "US", "vital signs": "VS",
    "weight": "wt", "white blood cell count": "WBC", "white count": "WBC", "with": "w/", "within normal limits": "WNL",
    "without": "w/o", "year old": "yo", "year-old": "yo", "years": "yrs",
}  # fmt: skip

#: Headings of records: of sections, of systems, and what both are called for short.
HEADINGS = (
    "Abdomen", "Abd", "Activity", "Admission date", "Allergies", "Allergy", "Anesthesia", "Assessment",
    "Assessment and plan", "A/P", "Back", "Breast", "Cardiac", "Cardiac exam", "Cardiology", "Cardiovascular", "CC",
    "Chest", "Chief complaint", "Code status", "Complications", "Consent", "Constitutional", "CV", "Dermatologic",
    "Dermatology", "Diet", "Discharge instructions", "Discharge medications", "Disposition", "Ears", "EKG",
    "Endocrine", "Endocrinology", "ENT", "Extremities", "Ext", "Eyes", "Family history", "FHx", "Findings", "Followup",
    "Gastroenterology", "Gastrointestinal", "Gen", "General", "Genitourinary", "GI", "GU", "Gynecologic", "HEENT",
    "Heart", "Hematologic", "Hematology", "History", "History of present illness", "Hospital course", "HPI", "Imaging",
    "Immunizations", "Impression", "Indications", "Instructions", "Integumentary", "Interval history", "Labs",
    "Laboratory data", "Lungs", "Lymphatic", "Medications", "Meds", "Musculoskeletal", "MSK", "Musculoskeletal exam",
    "Neck", "Neuro", "Neurologic", "Neurological", "Neurology", "Nose", "Objective", "Occupation", "Oncology",
    "Ophthalmology", "Orthopedics", "Orders", "Past medical history", "Past surgical history", "Patient", "Pelvic",
    "Physical exam", "Plan", "PMH", "PMHx", "Procedure", "Procedures", "Psych", "Psychiatric", "Psychiatry", "PSH",
    "Pulm", "Pulmonary", "Reason for visit", "Rectal", "Renal", "Resp", "Respiratory", "Results", "Review of systems",
    "Rheumatology", "ROS", "Skin", "Social history", "SHx", "Subjective", "Surgical history", "Throat", "Urology",
    "Vascular", "Vitals", "Vital signs",
)  # fmt: skip

#: Forms in which a heading stands alone.
HEADING_FORMS = ("{}", "{}:", "- {}", "\u2022 {}")

#: Share of the phrases that become shorthand.
SHORTENED = 0.7

#: Share of the mentions that are replaced, and of the abbreviations that are put in small letters.
REPLACED, SMALL = 0.6, 0.2
SEED = 13


def shortened(sentences: Sequence[Document], seed: int = SEED) -> Iterator[Document]:
    """The sentences, phrases outside their mentions put in shorthand; one without such a phrase stays as it is."""
    rng = random.Random(seed)
    for sentence in sentences:
        phrases = [
            (*found.span(), SHORTHAND[found[0].lower()])
            for found in _PHRASE.finditer(sentence.text)
            if not any(start < found.end() and found.start() < end for start, end, _ in sentence.spans)
        ]
        yield with_pieces(sentence, [phrase for phrase in phrases if rng.random() < SHORTENED])


# Longest first, for alternatives are tried in turn.
_PHRASE = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(SHORTHAND, key=len, reverse=True)))})(?!\w)", re.I)


def headings() -> Iterator[Document]:
    """Each heading in each form; none holds a mention."""
    for heading in HEADINGS:
        for form in HEADING_FORMS:
            yield Document(heading, form.format(heading), ())


def abbreviated(sentences: Sequence[Document], seed: int = SEED) -> Iterator[Document]:
    """The sentences that hold a mention, some of their mentions abbreviated, at least one in each."""
    rng = random.Random(seed)
    for sentence in sentences:
        if sentence.spans:
            yield _replaced(sentence, rng)


def _replaced(sentence: Document, rng: random.Random) -> Document:
    spans = sentence.spans
    chosen = {rng.randrange(len(spans)), *(i for i in range(len(spans)) if rng.random() < REPLACED)}
    pieces = []
    for i in sorted(chosen):
        mention = rng.choice(ABBREVIATIONS)
        pieces.append((*spans[i][:2], mention.lower() if rng.random() < SMALL else mention))
    return with_pieces(sentence, pieces)


def with_pieces(sentence: Document, pieces: Sequence[tuple[int, int, str]]) -> Document:
    """The sentence with stretches of its text replaced, in order, each a whole mention or outside all."""
    text, position, moved = "", 0, []
    for start, end, new in pieces:
        text += sentence.text[position:start] + new
        position = end
    text += sentence.text[position:]
    for start, end, label in sentence.spans:
        before = sum(len(new) - (high - low) for low, high, new in pieces if high <= start)
        inside = sum(len(new) - (high - low) for low, high, new in pieces if low == start)
        moved.append((start + before, end + before + inside, label))
    return replace(sentence, text=text, spans=tuple(moved))
