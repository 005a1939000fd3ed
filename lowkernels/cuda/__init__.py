"""The CUDA C++ kernels' Python side: building and loading the library (:mod:`.build`), its operators' schemas (:mod:`.library`),
laying out weights (:mod:`.pack`) and dividing work among CTAs (:mod:`.tiling`)."""
