"""Makes demonstrations for the cold start: samples a teacher, grades, and selects by rejection sampling."""
