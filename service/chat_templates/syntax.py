"""Extends the syntax tree of a chat template by filters that pay for loops, comparisons and values.

Their names cannot be written in a template. What each does is up to the environment that compiles the tree.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.visitor import NodeTransformer

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
    result = _Extension().visit(tree)
    assert isinstance(result, nodes.Template)  # noqa: S101 - a transformer may return anything
    return result


class _Extension(NodeTransformer):
    """Puts filters into a syntax tree that pay for loops and values; their names cannot be written in a template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateError("Chat templates may not have recursive loops.")
        work = STEP + NODE_WORK * (_num_nodes(node) - _num_nodes(node.iter))
        self.generic_visit(node)
        node.iter = _filter(COUNTED, node.iter, nodes.Const(work))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._with_steps(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._with_steps(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._with_steps(node)

    def _with_steps(self, node: Any) -> nodes.Node:
        work = STEP + NODE_WORK * _num_nodes(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(STEPS, nodes.Const(work)), lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(CONCATENATED, nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filter(MADE, node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" else _filter(MADE, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(MADE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        if any(True for _ in node.find_all(nodes.NSRef)):
            node.node = _filter(ASSIGNED, node.node)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        # A comparison takes as long as the shorter side; a constant is no longer than the template.
        is_short = isinstance(node.expr, nodes.Const)
        if not is_short and any(operand.op in {"in", "notin"} for operand in node.ops):
            node.expr = _filter(READ, node.expr)
        for operand in node.ops:
            is_equality = operand.op in {"eq", "ne"}
            if not isinstance(operand.expr, nodes.Const) and not (is_equality and is_short):
                operand.expr = _filter(READ, operand.expr)
            is_short = is_short or is_equality
        return node


def _filter(name: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    for arg in args:
        arg.set_lineno(node.lineno)
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _num_nodes(node: nodes.Node) -> int:
    return 1 + sum(map(_num_nodes, node.iter_child_nodes()))
