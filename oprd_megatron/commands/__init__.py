"""Groups of `oprd` commands, which check their input first. `oprd bridge` and `oprd convert` lie beside what they do."""
