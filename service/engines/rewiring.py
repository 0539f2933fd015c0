"""Replaces parts of a loaded model by faster ones: its attention, its linear layers, its blocks.

The model does not know its optimisations; a forward path asks for them here.
"""

from __future__ import annotations

from service.engines.compilation import compile_blocks, restore_blocks
from service.engines.kernels.bindings import Kernels
from service.engines.kernels.patching import attach_kernels, detach_kernels
from service.engines.linear.batch_invariant import set_batch_invariant_linear
from service.engines.model.classifier import Classifier


def rewire(
    classifier: Classifier,
    attention: str,
    *,
    batch_invariant_linear: bool = False,
    compiled: bool = False,
    kernels: Kernels | None = None,
) -> None:
    """Replace what a forward path wants replaced, after all that an earlier call replaced is restored.

    Args:
        classifier: changed in place.
        attention: an attention implementation that is registered with transformers.
        batch_invariant_linear: whether linear layers multiply in blocks of a fixed number of rows.
        compiled: whether the blocks run compiled, with an attention that can be.
        kernels: the compiled CPU kernels on which modules run where they can; None: transformers' own code runs.
    """
    classifier.model.set_attn_implementation(attention)
    set_batch_invariant_linear(classifier.body, blocked=batch_invariant_linear)
    restore_blocks(classifier.body)
    detach_kernels(classifier.body)
    if compiled:
        compile_blocks(classifier.blocks)
    if kernels is not None:
        attach_kernels(classifier.body, kernels)
