"""Replaces parts of a loaded model by faster ones: its attention, its linear layers, its blocks.

The model does not depend on its optimizations; a forward path applies them through this module.
"""

from __future__ import annotations

from service.engines.compilation import compile_blocks, restore_blocks
from service.engines.kernels.bindings import Kernels
from service.engines.kernels.patching import attach_kernels, detach_kernels
from service.engines.linear.batch_invariant import set_batch_invariant_linear
from service.engines.linear.batch_invariant_experts import set_batch_invariant_experts
from service.engines.linear.verified_blocks import set_verified_linear
from service.engines.model.classifier import Classifier


def rewire(
    classifier: Classifier,
    attention: str,
    *,
    batch_invariant_linear: bool = False,
    verified_linear: bool = False,
    compiled: bool = False,
    kernels: Kernels | None = None,
) -> None:
    """Undo the replacements of earlier calls, then apply those that a forward path requires.

    Args:
        classifier: changed in place.
        attention: an attention implementation that is registered with transformers.
        batch_invariant_linear: whether linear layers and experts multiply in blocks of fixed numbers of rows.
        verified_linear: whether linear layers multiply in blocks that have passed a trial, those of a head that does
            its own pooling included; not together with ``batch_invariant_linear``.
        compiled: whether the blocks run compiled; the attention must then support it.
        kernels: the CPU kernels, which replace modules where they compute the same; None: no module is replaced.
    """
    classifier.model.set_attn_implementation(attention)
    set_verified_linear(classifier.model, enabled=False)
    set_batch_invariant_linear(classifier.body, enabled=batch_invariant_linear)
    if verified_linear:
        set_verified_linear(classifier.multiplied_together, enabled=True)
    set_batch_invariant_experts(classifier.body, enabled=batch_invariant_linear)
    restore_blocks(classifier.body)
    detach_kernels(classifier.body)
    if compiled:
        compile_blocks(classifier.blocks)
    if kernels is not None:
        attach_kernels(classifier.body, kernels)
