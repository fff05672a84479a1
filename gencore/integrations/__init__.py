"""Our kernels in other libraries' models. Each of the packages here is named after one, and imports without it."""
