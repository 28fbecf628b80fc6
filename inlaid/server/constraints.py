"""The one constraint on an answer, among the names that OpenAI, vLLM and SGLang have for it."""

from __future__ import annotations

from inlaid.engine.request import Grammar
from inlaid.server.errors import BadRequest
from inlaid.server.protocol.openai import GenerateBody, StructuredOutputs
from inlaid.text.params import schema_grammar

_ANY_OBJECT = '{"type": "object"}'


def constraint(body: GenerateBody) -> Grammar | None:
    """Return the constraint that a body asks for; BadRequest: it asks for two."""
    white = _white_space(body)
    given: dict[str, Grammar] = {}
    for name, schema in (("guided_json", body.guided_json), ("json_schema", body.json_schema)):
        if schema is not None:
            given[name] = schema_grammar(name, schema, white)
    for name, regex in (("guided_regex", body.guided_regex), ("regex", body.regex)):
        if regex is not None:
            given[name] = Grammar(regex=regex)
    for name, text in (("guided_grammar", body.guided_grammar), ("ebnf", body.ebnf)):
        if text is not None:
            given[name] = Grammar(lark=text)
    if body.guided_choice is not None:
        given["guided_choice"] = Grammar(choice=tuple(body.guided_choice))
    if body.structured_outputs is not None:
        given |= _structured(body.structured_outputs, white)
    if (form := _of_format(body, white)) is not None:
        given["response_format"] = form
    if len(given) > 1:
        raise BadRequest(f"only one constraint is possible; given: {', '.join(given)}")
    return next(iter(given.values()), None)


def _white_space(body: GenerateBody) -> str | None:
    """Return the pattern of white space in JSON that the client asks for; an empty one: none is allowed."""
    output = body.structured_outputs or StructuredOutputs()
    if output.disable_any_whitespace:
        return ""
    return output.whitespace_pattern if output.whitespace_pattern is not None else body.guided_whitespace_pattern


def _structured(output: StructuredOutputs, white: str | None) -> dict[str, Grammar]:
    given: dict[str, Grammar] = {}
    if output.json is not None:
        given["structured_outputs.json"] = schema_grammar("structured_outputs", output.json, white)
    if output.regex is not None:
        given["structured_outputs.regex"] = Grammar(regex=output.regex)
    if output.grammar is not None:
        given["structured_outputs.grammar"] = Grammar(lark=output.grammar)
    if output.choice is not None:
        given["structured_outputs.choice"] = Grammar(choice=tuple(output.choice))
    if output.json_object:
        given["structured_outputs.json_object"] = schema_grammar("structured_outputs", _ANY_OBJECT, white)
    return given


def _of_format(body: GenerateBody, white: str | None) -> Grammar | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return schema_grammar("response_format", _ANY_OBJECT if form.schema is None else form.schema, white)
    if form.json_schema is None or form.json_schema.schema is None:
        raise BadRequest("response_format of type json_schema needs json_schema.schema", "response_format")
    return schema_grammar("response_format", form.json_schema.schema, white)
