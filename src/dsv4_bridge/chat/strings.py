"""The fixed strings of DeepSeek-V4's chat encoding: what the model was trained on, so exact to the byte.

Sources: the four encoding vectors that ship with the checkpoints (`tests/data/chat`), and for the
reasoning efforts `encoding/README.md` of the April releases and of Flash-0731 (quoted in
sgl-project/sglang#33185 and vllm-project/vllm#50580).
"""

from ..text.tokens import ASSISTANT, BOS, EOS, USER
from ..text.tokens import THOUGHT as THINK_END

THINK_START = "<think>"
REMINDER = "<｜latest_reminder｜>"
DSML = "｜DSML｜"
# Short answers for the search pipeline; the token stands where the answer begins.
TASKS = {name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")}

# In any message these would end the turn that holds them.
TURN_TOKENS = (BOS, EOS, USER, ASSISTANT, REMINDER, *TASKS.values())
# In an assistant's message these would end its thoughts or begin a tool call.
ANSWER_TOKENS = (THINK_START, THINK_END, DSML)

_ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root"
    " cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial"
    " scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered"
    " alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively"
    " decompose the problem into its most fundamental components, trace every causal chain to its root, and"
    " resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are"
    " certain that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
# Generation of releases -> reasoning effort -> text before everything else, in thinking mode.
# The same word means another text in the other generation: "high" of 0731 is "max" of April.
EFFORTS = {
    "april": {"high": "", "max": _ABSOLUTE},  # Flash, Pro, and their DSpark repositories
    "0731": {"low": "", "high": _ABSOLUTE, "max": _BEYOND},  # Flash-0731, Pro-0813
}

_CALLS = f"{DSML}tool_calls"
_INVOKE = f"{DSML}invoke"
_PARAMETER = f"{DSML}parameter"
CALLS_OPEN, CALLS_CLOSE = f"\n\n<{_CALLS}>\n", f"</{_CALLS}>"
INVOKE_OPEN, INVOKE_CLOSE = f'<{_INVOKE} name="', f"</{_INVOKE}>\n"
PARAMETER_OPEN, PARAMETER_CLOSE = f'<{_PARAMETER} name="', f"</{_PARAMETER}>"

TOOLS_HEAD = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{_CALLS}>" block like the following:

<{_CALLS}>
<{_INVOKE} name="$TOOL_NAME">
<{_PARAMETER} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{_PARAMETER}>
...
</{_INVOKE}>
<{_INVOKE} name="$TOOL_NAME2">
...
</{_INVOKE}>
</{_CALLS}>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_START}), you MUST output your complete reasoning inside \
{THINK_START}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

"""
TOOLS_TAIL = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
