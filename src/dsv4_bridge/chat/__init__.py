"""DeepSeek-V4's chat encoding, both ways."""

from .decode import parse_completion
from .encode import Segment, encode_messages, encode_segments
from .messages import Message, ToolCall, read_messages

__all__ = ["Message", "Segment", "ToolCall", "encode_messages", "encode_segments", "parse_completion", "read_messages"]
