"""What squeezing does to a teacher, before there is a student."""
