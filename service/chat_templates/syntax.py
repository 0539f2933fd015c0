"""Extends the syntax tree of a chat template by filters that pay for loops, comparisons and values.

Their names cannot be written in a template. What each does is up to the environment that compiles the tree.
"""

from __future__ import annotations

from jinja2 import TemplateError, nodes

from service.chat_templates.work import STEP

COUNTED = "%counted"
"""Pays for each value of a loop; its argument is the work of one."""

STEPS = "%steps"
"""Pays for the body of a macro or a block; its value is the work."""

READ = "%read"
"""Pays for reading a value."""

MADE = "%made"
"""Pays for a value that has been made."""

ASSIGNED = "%assigned"
"""Refuses a value that a namespace may not hold."""

CONCATENATED = "%concatenated"
"""Joins the texts of a tuple, and pays for them."""

NODE_WORK = 16
"""Work of one node of the syntax tree, in characters."""


def extended(tree: nodes.Template) -> nodes.Template:
    """Return the tree, which is changed.

    Raises:
        TemplateError: it has a recursive loop.
    """
    _extend_inside(tree)
    return tree


def _extended(node: nodes.Node) -> nodes.Node:
    """Return what takes the place of a node."""
    size = _num_nodes(node) if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) else 0
    if isinstance(node, nodes.For):
        size -= _num_nodes(node.iter)
    _extend_inside(node)
    work = STEP + NODE_WORK * size
    match node:
        case nodes.For():
            if node.recursive:
                raise TemplateError("Chat templates may not have recursive loops.")
            node.iter = _filter(COUNTED, node.iter, nodes.Const(work))
        case nodes.Macro() | nodes.CallBlock() | nodes.Block():
            node.body.insert(0, nodes.ExprStmt(_filter(STEPS, nodes.Const(work)), lineno=node.lineno))
        case nodes.Concat():
            return _filter(CONCATENATED, nodes.Tuple(node.nodes, "load", lineno=node.lineno))
        case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(arg=nodes.Slice()):
            return _filter(MADE, node)
        case nodes.Assign() if any(True for _ in node.find_all(nodes.NSRef)):
            node.node = _filter(ASSIGNED, node.node)
        case nodes.Compare():
            _extend_comparison(node)
    return node


def _extend_inside(node: nodes.Node) -> None:
    for name, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_extended(entry) if isinstance(entry, nodes.Node) else entry for entry in value]
        elif isinstance(value, nodes.Node):
            setattr(node, name, _extended(value))


def _extend_comparison(node: nodes.Compare) -> None:
    # A comparison takes as long as the shorter side; a constant is no longer than the template.
    is_short = isinstance(node.expr, nodes.Const)
    if not is_short and any(operand.op in {"in", "notin"} for operand in node.ops):
        node.expr = _filter(READ, node.expr)
    for operand in node.ops:
        is_equality = operand.op in {"eq", "ne"}
        if not isinstance(operand.expr, nodes.Const) and not (is_equality and is_short):
            operand.expr = _filter(READ, operand.expr)
        is_short = is_short or is_equality


def _filter(name: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Filter:
    for arg in args:
        arg.set_lineno(node.lineno)
    assert isinstance(node, nodes.Expr)  # noqa: S101 - what a loop goes through, or is made, is an expression
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _num_nodes(node: nodes.Node) -> int:
    return 1 + sum(map(_num_nodes, node.iter_child_nodes()))
