"""What a run will need in memory, disk and time, computed from shapes before anything runs.

``shapes`` reads a model's layout, ``costs`` turns what methods say of their work into time,
``sizes`` counts the bytes of every artifact, ``stages`` estimates one stage, ``machine`` says what
there is, and ``plan`` walks params.yaml.

May import from core up to serving.
"""

from llmpress.planning.machine import Machine, measure_machine
from llmpress.planning.plan import Plan, PlanRow, plan_compression
from llmpress.planning.project import plan_project
from llmpress.planning.shapes import ModelShapes, read_shapes

__all__ = [
    "Machine",
    "ModelShapes",
    "Plan",
    "PlanRow",
    "measure_machine",
    "plan_compression",
    "plan_project",
    "read_shapes",
]
