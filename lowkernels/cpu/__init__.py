"""The native CPU kernels' Python side: building and loading the library (:mod:`.build`), laying out weights (:mod:`.pack`)."""
