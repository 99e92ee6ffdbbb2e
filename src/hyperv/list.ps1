# Says which VMs Hyper-V has. It takes nothing in, so that nothing can be smuggled in, and says everything that a person
# has written in hexadecimal, so that nothing can be forged: no name ends a line, or looks like another one. Lines:
#   hvsock-vm ID STATE NAME
#   hvsock-failed KIND MESSAGE     KIND: module, denied, other
#   hvsock-done COUNT
# For Windows PowerShell 5.1, as one argument: without a double quote.
$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'
$WarningPreference = 'SilentlyContinue'
function Hex([string] $text) {
    '-' + [BitConverter]::ToString([Text.Encoding]::UTF8.GetBytes($text)).Replace('-', '')
}
function Say([string] $line) { [Console]::Out.WriteLine($line) }
function Fail([string] $kind, $record) {
    Say ('hvsock-failed ' + $kind + ' ' + (Hex $record.Exception.Message))
    exit
}
# Administrators with their rights, and Hyper-V Administrators, by their ids: the names are translated.
function Test-Rights {
    $who = [Security.Principal.WindowsIdentity]::GetCurrent()
    $principal = New-Object Security.Principal.WindowsPrincipal $who
    foreach ($id in 'S-1-5-32-544', 'S-1-5-32-578') {
        $group = New-Object Security.Principal.SecurityIdentifier $id
        if ($principal.IsInRole($group)) { return $true }
    }
    return $false
}
try { Import-Module Hyper-V } catch { Fail 'module' $_ }
try {
    # VMware's tools have a Get-VM as well.
    $vms = @(Hyper-V\Get-VM)
    # Older ones say this by an empty list.
    if ($vms.Count -eq 0 -and -not (Test-Rights)) { throw [UnauthorizedAccessException] 'no VM is shown to this user' }
    foreach ($vm in $vms) { Say ('hvsock-vm ' + $vm.Id + ' ' + $vm.State + ' ' + (Hex $vm.Name)) }
} catch {
    $denied = $_.CategoryInfo.Category -eq 'PermissionDenied' -or $_.Exception -is [UnauthorizedAccessException]
    if ($denied -or -not (Test-Rights)) { Fail 'denied' $_ }
    Fail 'other' $_
}
Say ('hvsock-done ' + $vms.Count)
