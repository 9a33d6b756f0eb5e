"""An example becomes what each policy sees: the student the whole images, the teacher the
evidence."""
