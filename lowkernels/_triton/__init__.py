"""What the Triton kernels of the operators share.

``device``: functions the kernels are made of; ``packing``: weight layouts; ``launch``: from a planned launch to a running one;
``configs``: tile sizes by operator, architecture and shape; ``aot``: compiles every shipped configuration without a GPU;
``layers``: the shapes of the LowFormer models, which the configurations are made for.

Nothing here is imported, and Triton is not either, before a call is served by the Triton backend or asks why it cannot be.
"""
