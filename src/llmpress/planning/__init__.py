"""What a run will need in memory, disk and time, before anything runs.

``shapes`` reads a model's layout and counts the bytes of artifacts, ``stages`` says what one stage
needs, ``records`` how long such stages took, and ``plan`` walks the stages of a project.
May import from core up to serving.
"""

from llmpress.planning.plan import Machine, Plan, measure_machine, plan_compression, plan_project
from llmpress.planning.shapes import ModelShapes, read_shapes

__all__ = [
    "Machine",
    "ModelShapes",
    "Plan",
    "measure_machine",
    "plan_compression",
    "plan_project",
    "read_shapes",
]
