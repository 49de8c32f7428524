"""All studies by name."""

from bt_fast.lab.studies.groups import GROUP_STUDIES
from bt_fast.lab.studies.study import Study
from bt_fast.lab.studies.sweeps import SWEEPS
from bt_fast.lab.studies.tables import TABLES

_ALL = (*GROUP_STUDIES, *SWEEPS, *TABLES)
STUDIES: dict[str, Study] = {study.name: study for study in sorted(_ALL, key=lambda study: study.name)}
