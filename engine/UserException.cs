namespace PerturbNas;

/// <summary>
/// Something that the user can put right: a missing file, a wrong size, an unknown operation. The message is one sentence that says
/// what, where and what to do; the CLI prints it without a stack trace and exits with code 2.
/// </summary>
public sealed class UserException(string message, Exception? cause = null) : Exception(message, cause);
