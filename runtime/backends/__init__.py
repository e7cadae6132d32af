"""Ways to run the vision half that are not our kernels, with one interface, and what describes exported files."""
